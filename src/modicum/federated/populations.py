"""Populations of clients: what each of them sees in a round, and new ones to be tested on.

A client of a round gets a task of its own, as a stream of support samples and a disjoint one of
query samples, made one by one.  Newcomers take part in no round and share no data with those who
do: no amplitude and phase, no alphabet, no speaker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.lower import Loss
from modicum.tasks import Labelled, Preprocess, by_group, take
from modicum.tasks.draws import TASK, permutation, uniform

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Sample = tuple[Array, Any]
"""x float32 as PyTorch has it, without a batch dimension; a label, or targets float32."""

Streams = tuple[Iterator[Sample], Iterator[Sample]]
Few = tuple[list[Sample], list[Sample]]


class Population(Protocol):
    """`clients` that take part in rounds, numbered from 0, and `newcomers` that never do.

    All that is drawn comes from `rng`: the same generator gives the same samples, whatever was
    drawn before, and in whatever order the two streams are read.
    """

    clients: int
    newcomers: int
    loss: Loss

    def streams(self, client: int, support: int, query: int, rng: np.random.Generator) -> Streams:
        """`support` and `query` samples of one task of a client; no sample is in both.

        Raises UsageError for a client that there is not, and InvalidInput for one that has fewer.
        """
        ...

    def newcomer(self, which: int, shots: int, query: int, rng: np.random.Generator) -> Few:
        """What a new client learns from, and `query` others to test it.

        `shots` are samples, or for labels samples of each class.  Raises as `streams`.
        """
        ...


class SineClients:
    """Regression of y = a sin(x + b), one wave per client, x from U(-5, 5).

    a from U(0.1, 5), b from U(0, pi), for client i a function of (seed, i) alone: Finn et al.,
    ICML 2017 (arXiv 1703.03400).
    """

    loss: Loss = "mse"

    def __init__(self, clients: int = 1000, newcomers: int = 100, seed: int = 0) -> None:
        _some_of_each(clients, newcomers)
        self.clients, self.newcomers, self.seed = clients, newcomers, seed

    def streams(self, client: int, support: int, query: int, rng: np.random.Generator) -> Streams:
        _within(client, self.clients, "client")
        wave = self.wave(client)
        return self._points(wave, support, _child(rng)), self._points(wave, query, _child(rng))

    def newcomer(self, which: int, shots: int, query: int, rng: np.random.Generator) -> Few:
        _within(which, self.newcomers, "newcomer")
        wave = self.wave(self.clients + which)
        return (
            list(self._points(wave, shots, _child(rng))),
            list(self._points(wave, query, _child(rng))),
        )

    def wave(self, i: int) -> tuple[float, float]:
        """(amplitude, phase) of client i; newcomers come after the clients."""
        a, b = uniform(self.seed, TASK, 0, np.array([i], np.int64), 2)[0].tolist()
        return 0.1 + 4.9 * a, np.pi * b

    @staticmethod
    def _points(wave: tuple[float, float], n: int, rng: np.random.Generator) -> Iterator[Sample]:
        amplitude, phase = wave
        for _ in range(n):
            x = rng.uniform(-5, 5, 1).astype(np.float32)
            yield x, (amplitude * np.sin(x + phase)).astype(np.float32)


class PartitionClients:
    """Classification with the same labels for all: a client has one part of a partition.

    `clients` and `newcomers` are parts, as `tasks.by_dirichlet`, `by_class` and `by_group` make
    them; no item may be in two.  A new client learns from `shots` of each class of which it has
    more, and is tested on others of these classes.
    """

    loss: Loss = "cross_entropy"

    def __init__(
        self, clients: Sequence[Labelled], newcomers: Sequence[Labelled], preprocess: Preprocess
    ) -> None:
        _some_of_each(len(clients), len(newcomers))
        _apart([*clients, *newcomers])
        self.clients, self.newcomers = len(clients), len(newcomers)
        self.preprocess = preprocess
        self.parts = (*clients, *newcomers)

    def streams(self, client: int, support: int, query: int, rng: np.random.Generator) -> Streams:
        _within(client, self.clients, "client")
        part = self.parts[client]
        if support + query > len(part):
            raise InvalidInput(
                f"client {client} has {len(part)} samples, {support} + {query} are asked for",
                hint="a smaller support or query, or a partition with more for each client",
            )
        drawn = rng.permutation(len(part))[: support + query]
        return self._samples(part, drawn[:support]), self._samples(part, drawn[support:])

    def newcomer(self, which: int, shots: int, query: int, rng: np.random.Generator) -> Few:
        _within(which, self.newcomers, "newcomer")
        part = self.parts[self.clients + which]
        order = rng.permutation(len(part))
        few: list[Indices] = []
        rest: list[Indices] = []
        for c in np.flatnonzero(part.counts > shots):
            at = order[part.labels[order] == c]
            few.append(at[:shots])
            rest.append(at[shots:])
        left = sum(map(len, rest))
        if shots < 1 or left < query:
            raise InvalidInput(
                f"newcomer {which} has {left} samples beside {shots} of each class to learn from",
                why=f"{query} are asked for",
                hint="fewer shots, or fewer test samples",
            )
        learned, tests = (rng.permutation(np.concatenate(side)) for side in (few, rest))
        return (
            list(self._samples(part, learned)),
            list(self._samples(part, tests[:query])),
        )

    def _samples(self, part: Labelled, drawn: Indices) -> Iterator[Sample]:
        return (_sample(part, self.preprocess, i) for i in drawn.tolist())


class SpeakerClients(PartitionClients):
    """Words that all clients share, spoken by one speaker each: a client is a group of a dataset.

    `newcomers` says how many groups, or which, take part in no round; a number is drawn by `seed`.
    """

    def __init__(
        self,
        dataset: Labelled,
        preprocess: Preprocess,
        newcomers: int | Sequence[str] = 2,
        seed: int = 0,
    ) -> None:
        parts = by_group(dataset)
        seen, new = _held_back([_group(p) for p in parts], newcomers, seed, "speaker")
        self.speakers = tuple(_group(parts[i]) for i in (*seen, *new))
        super().__init__([parts[i] for i in seen], [parts[i] for i in new], preprocess)


class CharacterClients:
    """Few-shot tasks of `ways` characters from one alphabet: a client is an alphabet.

    Classes are called ALPHABET/CHARACTER (`load(..., class_level=2)`) and groups are drawers, if
    there are any: then no drawer of a task is in both its streams, as nobody's hand would be.
    Labels 0 .. ways - 1 are given anew in each task, so a new client has to learn them.  With
    `turned` each alphabet is four clients, one for each quarter turn; those are other characters.
    `newcomers` says how many alphabets, or which, take part in no round; they are upright.
    """

    loss: Loss = "cross_entropy"

    def __init__(
        self,
        dataset: Labelled,
        preprocess: Preprocess,
        ways: int = 5,
        newcomers: int | Sequence[str] = 2,
        turned: bool = False,
        seed: int = 0,
    ) -> None:
        if ways < 2:
            raise UsageError(f"{ways} ways leave nothing to tell apart")
        if turned and preprocess.shape[1] != preprocess.shape[2]:
            raise UsageError("only square images have quarter turns")
        alphabet = [name.rpartition("/")[0] for name in dataset.classes]
        names = sorted(set(alphabet))
        seen, new = _held_back(names, newcomers, seed, "alphabet")
        self.alphabets = tuple(names[i] for i in (*seen, *new))
        self.ways, self.turns, self.preprocess = ways, 4 if turned else 1, preprocess
        self.clients, self.newcomers = len(seen) * self.turns, len(new)
        label = np.array([names.index(a) for a in alphabet], np.int64)
        self._parts = [_Drawers(dataset, np.flatnonzero(label == i)) for i in (*seen, *new)]

    def streams(self, client: int, support: int, query: int, rng: np.random.Generator) -> Streams:
        _within(client, self.clients, "client")
        part, turn = divmod(client, self.turns)
        sides = self._drawn(f"client {client}", part, support, query, rng)
        first, second = (self._samples(part, turn, side) for side in sides)
        return first, second

    def newcomer(self, which: int, shots: int, query: int, rng: np.random.Generator) -> Few:
        _within(which, self.newcomers, "newcomer")
        part = self.clients // self.turns + which
        sides = self._drawn(f"newcomer {which}", part, shots * self.ways, query, rng)
        few, tests = (list(self._samples(part, 0, side)) for side in sides)
        return few, tests

    def _drawn(
        self, who: str, part: int, support: int, query: int, rng: np.random.Generator
    ) -> tuple[Indices, Indices]:
        """(position, label) pairs of both sides, classes as evenly as the numbers allow."""
        each = -(-support // self.ways), -(-query // self.ways)
        sides = self._parts[part].sides(self.ways, *each, rng)
        if sides is None:
            raise InvalidInput(
                f"{who} ({self.alphabets[part]!r}) has fewer than {self.ways} characters with "
                f"{each[0]} + {each[1]} images" + (" of other drawers" if min(each) else ""),
                hint="fewer ways, or a smaller support and query",
            )
        first, second = (
            rng.permutation(_interleaved(side, rng)[:n])
            for side, n in zip(sides, (support, query), strict=True)
        )
        return first, second

    def _samples(self, part: int, turn: int, drawn: Indices) -> Iterator[Sample]:
        dataset = self._parts[part].dataset
        for i, label in drawn.tolist():
            x, _ = _sample(dataset, self.preprocess, i)
            yield np.ascontiguousarray(np.rot90(x, turn, axes=(1, 2))), label


class _Drawers:
    """The characters of one alphabet: which images of which are from whom."""

    def __init__(self, dataset: Labelled, classes: Indices) -> None:
        at = np.flatnonzero(np.isin(dataset.labels, classes))
        self.dataset = dataset.subset(at)
        names = self.dataset.group or self.dataset.names
        self.drawers, self.drawer = np.unique(np.array(names), return_inverse=True)
        self.members = [np.flatnonzero(self.dataset.labels == c) for c in classes]
        self.table = np.zeros((len(classes), len(self.drawers)), np.int64)
        for row, members in zip(self.table, self.members, strict=True):
            np.add.at(row, self.drawer[members], 1)

    def sides(
        self, ways: int, support: int, query: int, rng: np.random.Generator
    ) -> tuple[Indices, Indices] | None:
        """(ways, support) and (ways, query) positions of classes that have so many, or None.

        Drawers stand in a drawn order; the queries are from those before some place in it, the
        support from those after, so that most classes have enough of both.
        """
        order = rng.permutation(len(self.drawers))
        before = np.cumsum(self.table[:, order], axis=1)
        before = np.concatenate([np.zeros((len(before), 1), np.int64), before], axis=1)
        enough = (before >= query) & (before[:, -1:] - before >= support)
        place = int(enough.sum(0).argmax())
        usable = np.flatnonzero(enough[:, place])
        if len(usable) < ways:
            return None
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        first, second = [], []
        for c in rng.permutation(usable)[:ways]:
            members = rng.permutation(self.members[c])
            asked = rank[self.drawer[members]] < place
            first.append(members[~asked][:support])
            second.append(members[asked][:query])
        return np.stack(first), np.stack(second)


def _interleaved(side: Indices, rng: np.random.Generator) -> Indices:
    """(ways * n, 2): position and label, all classes once, then all once again; n columns."""
    ways, n = side.shape
    labels = np.stack([rng.permutation(ways) for _ in range(n)]) if n else np.zeros((0, ways), int)
    return np.stack([side.T[np.arange(n)[:, None], labels].ravel(), labels.ravel()], 1)


def _sample(dataset: Labelled, preprocess: Preprocess, i: int) -> Sample:
    x, y = take(dataset, preprocess, [i])
    return x[0], int(y[0])


def _child(rng: np.random.Generator) -> np.random.Generator:
    """A generator of its own, so that streams can be read in any order."""
    return np.random.default_rng(int(rng.integers(1 << 63)))


def _held_back(
    names: Sequence[str], newcomers: int | Sequence[str], seed: int, what: str
) -> tuple[list[int], list[int]]:
    """(those that take part, the newcomers), as positions in `names`."""
    if isinstance(newcomers, int):
        order = permutation(seed, 0, len(names)).tolist()
        new = sorted(order[:newcomers]) if newcomers > 0 else []
    else:
        unknown = sorted(set(newcomers) - set(names))
        if unknown:
            raise UsageError(
                f"there is no {what} {unknown[0]!r}", hint="there are " + ", ".join(names)
            )
        new = [names.index(n) for n in newcomers]
    seen = [i for i in range(len(names)) if i not in set(new)]
    _some_of_each(len(seen), len(new))
    return seen, new


def _some_of_each(clients: int, newcomers: int) -> None:
    if clients < 1 or newcomers < 1:
        raise UsageError(
            f"a population of {clients} clients and {newcomers} newcomers",
            why="at least one takes part in rounds, and one other is to be tested",
        )


def _apart(parts: Sequence[Labelled]) -> None:
    seen: dict[tuple[int, int], int] = {}
    for k, part in enumerate(parts):
        if not len(part):
            raise InvalidInput(f"part {k} of the partition has no items")
        if part.classes != parts[0].classes:
            raise InvalidInput(f"part {k} of the partition has other classes than part 0")
        for i in part.index.tolist():
            other = seen.setdefault((id(part.source), i), k)
            if other != k:
                raise InvalidInput(
                    f"parts {other} and {k} of the partition share {part.source.name(i)!r}"
                )


def _within(i: int, n: int, what: str) -> None:
    if not 0 <= i < n:
        raise UsageError(f"there is no {what} {i}", why=f"they are numbered from 0 to {n - 1}")


def _group(part: Labelled) -> str:
    assert part.group is not None
    return part.group[0]
