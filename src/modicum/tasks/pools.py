"""What a few-shot task is drawn from, and which groups of a class go to which side of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import draws
from modicum.tasks.labelled import Labelled, agree

Indices = NDArray[np.int64]

NEVER = 1 << 40
"""More images than there are."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Where the support and the queries come from: two sets, or one for both.

    `members` and `asked` are the positions of each class's images in them.  `groups`, of all
    images of either, is None unless no group of a class may be on both sides.
    """

    dataset: Labelled
    query: Labelled
    members: list[Indices]
    asked: list[Indices]
    groups: tuple[Indices, Indices] | None

    @property
    def one(self) -> bool:
        """Whether the queries are taken from the support's set."""
        return self.query is self.dataset

    def groups_of(self, c: int) -> Groups:
        """The groups of class c, where they matter."""
        assert self.groups is not None
        mine, theirs = self.groups[0][self.members[c]], self.groups[1][self.asked[c]]
        numbers, at = np.unique(np.concatenate([mine, theirs]), return_inverse=True)
        losses = np.bincount(at[: len(mine)], minlength=len(numbers))
        return Groups(numbers, losses, np.bincount(at[len(mine) :], minlength=len(numbers)))

    def most_queries(self, c: int, kept: int, wanted: int) -> int:
        """How many queries of class c there can be, up to `wanted`, with `kept` support images."""
        spare = len(self.members[c]) - kept
        if spare < 0:
            return 0
        if self.groups is None:
            return min(wanted, spare if self.one else len(self.asked[c]))
        groups = self.groups_of(c)
        fewest = _fewest_lost(groups.losses, groups.gains, wanted)[0]
        return int(np.searchsorted(fewest, spare, side="right")) - 1

    def sides(
        self, c: int, kept: int, queries: int, seed: int, index: int
    ) -> tuple[Indices, Indices]:
        """Positions that support and queries of class c can take in task `index`, as drawn.

        At least `kept`, and at least `queries`, where `most_queries` said that there can be.
        """
        members = _shuffled(self.members[c], seed, index, 0)
        asked = members if self.one else _shuffled(self.asked[c], seed, index, 1)
        if self.groups is None:
            return (members[queries:] if self.one else members), asked
        groups = self.groups_of(c)
        keys = draws.uniform(seed, draws.GROUPS, index, groups.numbers, 1)[:, 0]
        order = np.lexsort([keys, groups.losses > 0])  # what costs the support nothing comes first
        spare = len(members) - kept
        taken = order[_divide(groups.losses[order], groups.gains[order], queries, spare)]
        mine, theirs = (
            np.isin(of[at], groups.numbers[taken])
            for of, at in zip(self.groups, (members, asked), strict=True)
        )
        return members[~mine], asked[theirs]


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of one class: number, images in the support's set, images in the queries'."""

    numbers: Indices
    losses: Indices
    gains: Indices


def pool(dataset: Labelled, query: Labelled | None, apart: bool) -> Pool:
    """Raises InvalidInput for sets that differ in classes or share images; UsageError."""
    members = _by_class(dataset)
    if query is None:
        groups = _numbered(dataset, dataset) if apart else None
        return Pool(dataset, dataset, members, members, groups)
    agree(dataset.classes, query.classes, "the dataset", "the query set")
    if query.source is dataset.source:
        shared = np.intersect1d(dataset.index, query.index)
        if len(shared):
            raise InvalidInput(
                f"the dataset and the query set share {len(shared)} images",
                where=f"the first is {dataset.source.name(int(shared[0]))!r}",
                hint="parts of one split(...); or one set for both, without query",
            )
    groups = _numbered(dataset, query) if apart else None
    return Pool(dataset, query, members, _by_class(query), groups)


def _by_class(dataset: Labelled) -> list[Indices]:
    """Positions of the images of each class; of an image that is there twice, the first."""
    at = np.sort(np.unique(dataset.index, return_index=True)[1])
    at = at[np.argsort(dataset.labels[at], kind="stable")]
    ends = np.cumsum(np.bincount(dataset.labels[at], minlength=len(dataset.classes)))
    return np.split(at, ends[:-1])


def _numbered(dataset: Labelled, query: Labelled) -> tuple[Indices, Indices]:
    if dataset.group is None or query.group is None:
        raise UsageError(
            "apart needs a dataset with groups", hint="load(..., group='a regular expression')"
        )
    number: dict[str, int] = {}
    one, other = (
        np.array([number.setdefault(g, len(number)) for g in names], dtype=np.int64)
        for names in (dataset.group, query.group)
    )
    return one, other


def _shuffled(at: Indices, seed: int, index: int, column: int) -> Indices:
    keys = draws.uniform(seed, draws.MEMBERS, index, at, 2)[:, column]
    return at[np.argsort(keys, kind="stable")]


def _divide(losses: Indices, gains: Indices, wanted: int, spare: int) -> list[int]:
    """Which groups go to the queries: `wanted` of them, at the cost of `spare` support images.

    Each in turn does, until there are enough, if it has a query, and if the rest can then still
    make up the number for what is left to spend.
    """
    fewest = _fewest_lost(losses, gains, wanted)
    taken = []
    for g, (loss, gain) in enumerate(zip(losses.tolist(), gains.tolist(), strict=True)):
        after = max(0, wanted - gain)
        if loss == 0 or (after < wanted and loss + fewest[g + 1, after] <= spare):
            taken.append(g)
            wanted, spare = after, spare - loss
    return taken


def _fewest_lost(losses: Indices, gains: Indices, wanted: int) -> Indices:
    """(groups + 1, wanted + 1): the support images that q queries of groups g, g + 1, .. cost."""
    table = np.full((len(losses) + 1, wanted + 1), NEVER)
    table[:, 0] = 0
    q = np.arange(wanted + 1)
    for g in range(len(losses) - 1, -1, -1):
        with_it = losses[g] + table[g + 1, np.maximum(q - gains[g], 0)]
        table[g] = np.minimum(table[g + 1], with_it)
    return table
