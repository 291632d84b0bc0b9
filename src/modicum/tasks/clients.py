"""Partitions of a dataset between clients whose data differ: by group, by label skew, by class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.tasks.labelled import Labelled

Indices = NDArray[np.int64]

TRIES = 100
"""Dirichlet draws before there is said to be none that gives every client enough."""


def by_group(dataset: Labelled, groups: Sequence[str] | None = None) -> tuple[Labelled, ...]:
    """A client for each group (drawer, speaker, device), in the order of their names.

    `groups` (n,) names the group of each item, `dataset.group` if left out; the parts have it as
    their `group`.  Every item goes to exactly one client.  Raises UsageError for a dataset without
    groups, and InvalidInput for another number of groups than items.
    """
    names = dataset.group if groups is None else tuple(groups)
    if names is None:
        raise UsageError(
            "the dataset has no groups to divide it by",
            hint="load(..., group='a regular expression'), or by_group(dataset, groups)",
        )
    named = Labelled(dataset.source, dataset.index, dataset.labels, dataset.classes, names)
    found, client_of = np.unique(np.array(names), return_inverse=True)
    return _parts(named, client_of.astype(np.int64), len(found))


def by_dirichlet(
    dataset: Labelled, clients: int, alpha: float, *, seed: int = 0, least: int = 1
) -> tuple[Labelled, ...]:
    """Clients with other shares of each class; the smaller `alpha`, the more they differ.

    For each class c, shares over the N clients are drawn::

        p_c ~ Dirichlet(alpha, .., alpha)

    and client i gets the share p_c[i] of the items of c (Yurochkin et al., ICML 2019, arXiv
    1905.12022; Li et al., ICDE 2022, arXiv 2102.02079).  Every item goes to exactly one client.
    Draws that leave a client less than `least` items are drawn again.  A pure function of names
    and seed: neither the order of files nor the machine matters.

    Raises UsageError for numbers that make no sense, and InvalidInput where there are too few items
    or no draw gives each client enough.
    """
    if clients < 1 or least < 0 or not 0 < alpha <= 1e6:
        raise UsageError(
            f"clients={clients}, alpha={alpha:g}, least={least} is out of range",
            hint="at least one client, alpha from just above 0 to 1e6",
        )
    _enough(dataset, clients, least)
    members = _shuffled_classes(dataset, seed)
    for attempt in range(TRIES):
        client_of = np.zeros(len(dataset), np.int64)
        for c, at in enumerate(members):
            ends = np.cumsum(_dirichlet(clients, alpha, seed, f"{attempt}/{dataset.classes[c]}"))
            ends = np.round(ends / ends[-1] * len(at)).astype(np.int64)
            client_of[at] = np.searchsorted(ends, np.arange(len(at)), side="right")
        if np.bincount(client_of, minlength=clients).min() >= least:
            return _parts(dataset, client_of, clients)
    raise InvalidInput(
        f"no draw of {TRIES} gives each of {clients} clients {least} items",
        why=f"there are {len(dataset)} items, and alpha={alpha:g} shares them unequally",
        hint="fewer clients, a larger alpha, or a smaller least",
    )


def by_class(
    dataset: Labelled, clients: int, classes: int, *, seed: int = 0
) -> tuple[Labelled, ...]:
    """Clients with `classes` classes each; those who have a class divide its items evenly.

    All classes are given to as many clients, or to one more than others (McMahan et al., AISTATS
    2017, arXiv 1602.05629, with 2 each).  Every item goes to exactly one client.  A pure function
    of names and seed.

    Raises UsageError for numbers that make no sense or leave a class without a client, and
    InvalidInput for a class with fewer items than clients that have it.
    """
    present = np.flatnonzero(dataset.counts)
    if clients < 1 or not 1 <= classes <= len(present):
        raise UsageError(
            f"{clients} clients cannot have {classes} classes each",
            why=f"the dataset has {len(present)} classes",
        )
    if clients * classes < len(present):
        raise UsageError(
            f"{clients} clients with {classes} classes each leave classes without a client",
            why=f"the dataset has {len(present)} classes",
            hint="more clients, or more classes each",
        )
    owners: list[list[int]] = [[] for _ in dataset.classes]
    names = dataset.classes
    for client in range(clients):  # the classes that fewest have, in a drawn order
        drawn = {k: _hash(seed, f"{client}/{names[k]}") for k in present.tolist()}
        for k in sorted(drawn, key=lambda k: (len(owners[k]), drawn[k]))[:classes]:
            owners[k].append(client)
    client_of = np.zeros(len(dataset), np.int64)
    for c, at in enumerate(_shuffled_classes(dataset, seed)):
        if len(at) < len(owners[c]):
            raise InvalidInput(
                f"class {names[c]!r} has {len(at)} items for {len(owners[c])} clients",
                hint="fewer clients, or fewer classes each",
            )
        for k, client in enumerate(owners[c]):
            client_of[at[k :: len(owners[c])]] = client
    return _parts(dataset, client_of, clients)


def _parts(dataset: Labelled, client_of: Indices, clients: int) -> tuple[Labelled, ...]:
    """Each keeps the order of the dataset."""
    order = np.argsort(client_of, kind="stable")
    ends = np.cumsum(np.bincount(client_of, minlength=clients))[:-1]
    return tuple(dataset.subset(at) for at in np.split(order, ends))


def _enough(dataset: Labelled, clients: int, least: int) -> None:
    if len(dataset) < clients * max(1, least):
        raise InvalidInput(
            f"{len(dataset)} items are too few for {clients} clients",
            why=f"each is to have at least {max(1, least)}",
            hint="fewer clients",
        )


def _shuffled_classes(dataset: Labelled, seed: int) -> list[Indices]:
    """The positions of each class's items, in an order that a hash of seed and name makes."""
    rank = np.empty(len(dataset), np.int64)
    hashes = [_hash(seed, name) for name in dataset.names]
    rank[sorted(range(len(dataset)), key=hashes.__getitem__)] = np.arange(len(dataset))
    return [
        at[np.argsort(rank[at])]
        for at in (np.flatnonzero(dataset.labels == c) for c in range(len(dataset.classes)))
    ]


def _dirichlet(n: int, alpha: float, seed: int, what: str) -> NDArray[np.float64]:
    """Shares (n,), not negative, that sum to 1.

    In logarithms, since a gamma variable of a small shape is often below any float:
    log Gamma(alpha) = log Gamma(alpha + 1) + log(U) / alpha.  RandomState draws the same with every
    version of numpy, which Generator does not promise.
    """
    random = np.random.RandomState(np.frombuffer(_hash(seed, what), "<u4"))
    logs = np.log(random.standard_gamma(alpha + 1, n)) + np.log1p(-random.random_sample(n)) / alpha
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum())


def _hash(seed: int, what: str) -> bytes:
    return hashlib.sha256(f"{seed}/{what}".encode("utf-8", "surrogateescape")).digest()
