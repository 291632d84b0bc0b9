"""Few-shot tasks: N ways, a support set to learn from and a query set to be judged on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from modicum.errors import InvalidInput, UsageError
from modicum.graph import Frozen
from modicum.tasks import draws, pools
from modicum.tasks.labelled import Labelled
from modicum.tasks.pools import Indices, Pool

Count = Annotated[int, Field(ge=1)]
Ways = Annotated[int, Field(ge=2)]
LogWeight = Annotated[float, Field(ge=-50.0, le=50.0)]

SHOWN = 5
"""So many classes are named in one error."""


class FixedEpisodes(Frozen):
    """N-way K-shot: `shots` support and `queries` query images of each class.

    A range of `ways` is drawn from uniformly, up to the classes there are.
    """

    kind: Literal["fixed"] = "fixed"
    ways: Ways | tuple[Ways, Ways] = 5
    shots: Count = 5
    queries: Count = 10

    @model_validator(mode="after")
    def _ordered(self) -> FixedEpisodes:
        if self.range[0] > self.range[1]:
            raise ValueError("ways are (fewest, most)")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """(fewest, most) ways."""
        return self.ways if isinstance(self.ways, tuple) else (self.ways, self.ways)


class VariousEpisodes(Frozen):
    """Various ways and shots: Meta-Dataset (Triantafillou et al., ICLR 2020, arXiv 1903.03096).

    For drawn classes C, class c with n_c images::

        |C| ~ U{5, .., min(50, classes)}                   `ways`; or all, where there are fewer
        q   = min(10, min_c floor(n_c / 2))                `queries` of each class
        |S| = min(500, sum_c ceil(β min(100, n_c - q)))    β ~ U(0, 1]
        k_c = min(floor(R_c (|S| - |C|)) + 1, n_c - q)     shots of class c
        R_c = exp(α_c) n_c / sum_j exp(α_j) n_j            α ~ U[log 0.5, log 2): `log_weights`

    where 500 is `support_limit` and 100 `class_limit`.  Classes are drawn uniformly, also where
    Meta-Dataset goes by a hierarchy (ImageNet, Omniglot).
    """

    kind: Literal["various"] = "various"
    ways: tuple[Ways, Ways] = (5, 50)
    support_limit: Count = 500
    class_limit: Count = 100
    queries: Count = 10
    log_weights: tuple[LogWeight, LogWeight] = (-math.log(2), math.log(2))

    @model_validator(mode="after")
    def _ordered(self) -> VariousEpisodes:
        if self.ways[0] > self.ways[1] or self.log_weights[0] > self.log_weights[1]:
            raise ValueError("ways and log_weights are (fewest, most)")
        if self.support_limit < self.ways[1]:
            raise ValueError("support_limit is smaller than the ways: one shot each needs more")
        return self

    @property
    def range(self) -> tuple[int, int]:
        """(fewest, most) ways."""
        return self.ways


EpisodeRule = FixedEpisodes | VariousEpisodes


@dataclass(frozen=True, eq=False)
class Task:
    """Label k is ``classes[k]``, in both sets, which hold their images class by class."""

    classes: tuple[str, ...]
    support: Labelled
    query: Labelled

    @property
    def ways(self) -> int:
        """How many classes there are to tell apart."""
        return len(self.classes)

    @property
    def shots(self) -> NDArray[np.int64]:
        """(ways,): support images of each class."""
        return self.support.counts


def draw_task(
    dataset: Labelled,
    rule: EpisodeRule,
    *,
    seed: int,
    index: int,
    query: Labelled | None = None,
    apart: bool = False,
) -> Task:
    """Task number `index` of the tasks that `seed` makes of a dataset.

    A pure function of its arguments: the same in any order, process and version of numpy, so
    that all methods are compared on the same tasks.  Classes that are too small for the rule are
    left out.

    `query`: another set with the same classes, from which the queries are drawn.  They then take
    no image from the support, and in VariousEpisodes need not be fewer for its sake.

    `apart`: a group of a class (a drawer, a track, a speaker) is on one side only.  Groups go to
    the queries in one order for all classes, drawn anew in each task, until they are enough; in
    VariousEpisodes they leave at least half of the images to the support.

    Raises InvalidInput where too few classes are large enough, where `query` has other classes
    or shares images with `dataset`; UsageError for `apart` without groups.
    """
    return next(tasks(dataset, rule, 1, seed=seed, start=index, query=query, apart=apart))


def tasks(
    dataset: Labelled,
    rule: EpisodeRule,
    count: int,
    *,
    seed: int = 0,
    start: int = 0,
    query: Labelled | None = None,
    apart: bool = False,
) -> Iterator[Task]:
    """Tasks `start` .. `start` + `count` - 1.  See `draw_task`."""
    if count < 0 or start < 0:
        raise UsageError(f"there are no {count} tasks from number {start} on")
    pool = pools.pool(dataset, query, apart)
    most = np.array(
        [
            pool.most_queries(c, _kept(pool, c, rule), rule.queries)
            for c in range(len(dataset.classes))
        ],
        dtype=np.int64,
    )
    least, ways = (rule.queries, rule.range[0]) if isinstance(rule, FixedEpisodes) else (1, 2)
    most[most < least] = 0
    if np.count_nonzero(most) < ways:
        raise _too_few(pool, rule, np.flatnonzero(most))
    return (_draw(pool, most, rule, int(seed), index) for index in range(start, start + count))


def given_task(support: Labelled, query: Labelled | None = None) -> Task:
    """The task of a user's own sets; without `query`, its query set is empty.

    Classes are those with an image in the support, in its order; the query set's are found by
    name, and may be fewer.  Raises InvalidInput for one class alone, and for a query image of a
    class that the support does not have.
    """
    present = np.flatnonzero(support.counts)
    if len(present) < 2:
        raise InvalidInput(
            "there is nothing to tell apart: the support set has "
            + (f"one class, {support.classes[present[0]]!r}" if len(present) else "no images"),
            hint="at least one image of each of two classes",
        )
    classes = tuple(support.classes[k] for k in present)
    query = support.subset([]) if query is None else query
    unknown = [k for k in np.flatnonzero(query.counts) if query.classes[k] not in classes]
    if unknown:
        names = [f"{query.classes[k]!r}: {query.counts[k]} query images" for k in unknown]
        raise InvalidInput(
            f"the query set has {len(unknown)} classes that the support set has no image of",
            why=_some(names),
            where=f"the support set has {', '.join(_some([repr(c) for c in classes]))}",
            hint="add an image of each to the support set, or leave the queries out",
        )
    return Task(classes, _relabelled(support, classes), _relabelled(query, classes))


# ---- a draw --------------------------------------------------------------------------------------


def _kept(pool: Pool, c: int, rule: EpisodeRule) -> int:
    """Images of a class that its queries must leave to the support: half, where that varies."""
    return rule.shots if isinstance(rule, FixedEpisodes) else max(1, -(-len(pool.members[c]) // 2))


def _draw(pool: Pool, most: Indices, rule: EpisodeRule, seed: int, index: int) -> Task:
    """Task `index`, given the queries that each class can have, 0 where it is too small."""
    usable = np.flatnonzero(most)
    chance = draws.uniform(seed, draws.TASK, index, np.arange(1 + len(most)), 2)
    low, high = (min(ways, len(usable)) for ways in rule.range)
    ways = low + int(chance[0, 0] * (high - low + 1))
    drawn = usable[np.argsort(chance[1 + usable, 0], kind="stable")[:ways]]
    queries = int(most[drawn].min())
    sides = [pool.sides(c, _kept(pool, c, rule), queries, seed, index) for c in drawn.tolist()]
    if isinstance(rule, FixedEpisodes):
        shots = np.full(ways, rule.shots)
    else:
        sizes = np.array([len(pool.members[c]) for c in drawn])
        room = np.array([len(side) for side, _ in sides])
        shots = _various_shots(rule, sizes, room, 1 - chance[0, 1], chance[1 + drawn, 1])
    support = np.concatenate([side[:k] for (side, _), k in zip(sides, shots, strict=True)])
    query = np.concatenate([side[:queries] for _, side in sides])
    classes = tuple(pool.dataset.classes[c] for c in drawn)
    return Task(
        classes,
        _relabelled(pool.dataset.subset(support), classes),
        _relabelled(pool.query.subset(query), classes),
    )


def _various_shots(
    rule: VariousEpisodes, sizes: Indices, room: Indices, beta: float, chance: NDArray[np.float64]
) -> Indices:
    """(ways,): shots of classes with `sizes` images, of which `room` are left by the queries."""
    shares = np.ceil(beta * np.minimum(rule.class_limit, room))
    total = min(rule.support_limit, int(shares.sum()))
    low, high = rule.log_weights
    weights = np.exp(low + (high - low) * chance) * sizes
    wanted: NDArray[np.float64] = np.floor(weights / weights.sum() * (total - len(sizes))) + 1
    return np.minimum(wanted, room).astype(np.int64)


def _too_few(pool: Pool, rule: EpisodeRule, usable: Indices) -> InvalidInput:
    names = pool.dataset.classes
    if isinstance(rule, FixedEpisodes):
        ways, needs = rule.range[0], f"{rule.shots} shots and {rule.queries} queries"
    else:
        ways, needs = 2, "a shot and a query"
    if pool.groups is not None:
        needs += " of other groups"
    there = f"{len(usable)} of {len(names)} are large enough for {needs}"
    small = []
    for c in np.setdiff1d(np.arange(len(names)), usable).tolist():
        line = f"{names[c]!r} has {len(pool.members[c])} images"
        if pool.groups is not None:
            line += f" of {np.count_nonzero(pool.groups_of(c).losses)} groups"
        if not pool.one:
            line += f", and {len(pool.asked[c])} in the query set"
        small.append(line)
    if not small:
        there = f"there are {len(names)}: {', '.join(_some([repr(name) for name in names]))}"
    return InvalidInput(
        f"a task of {ways} ways needs as many classes; {there}",
        why="one class alone leaves nothing to tell apart" if len(names) == 1 else _some(small),
        hint="fewer ways, shots or queries; or more images",
    )


def _relabelled(dataset: Labelled, classes: Sequence[str]) -> Labelled:
    """The same images, with labels that count into `classes`."""
    number = {name: k for k, name in enumerate(classes)}
    label = np.array([number.get(name, 0) for name in dataset.classes], np.int64)
    return Labelled(
        dataset.source, dataset.index, label[dataset.labels], tuple(classes), dataset.group
    )


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]
