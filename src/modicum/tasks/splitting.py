"""`split` and `split_classes`: parts that never overlap and are the same on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.tasks.labelled import Labelled

Part = float | int | None
Indices = NDArray[np.int64]


def split(
    dataset: Labelled,
    parts: Sequence[Part],
    *,
    seed: int = 0,
    stratified: bool = True,
    by_group: bool = False,
) -> tuple[Labelled, ...]:
    """Divide a dataset, one result per part; what no part asks for is left out.

    `parts` are all fractions (floats, of 1.0 together at most), or all counts (whole numbers) of
    images, of each class where `stratified`; one may be None: the rest.  With `by_group` no group
    lies in two parts, counts are counts of groups, and fractions are met as well as whole groups
    allow.  Where groups have images of several classes (one drawer of all characters), they are
    drawn from all classes together, and `stratified` says that each part must have every class.

    A hash of seed and name decides who goes where: neither the order of files nor the machine
    matters, and images that are added or removed move few others.  Each part keeps the order of
    the dataset.  Raises InvalidInput where a part would get no image, or none of some class, or a
    class has too few; UsageError for parts that make no sense.
    """
    _sensible(parts)
    if by_group and dataset.group is None:
        raise UsageError(
            "by_group needs a dataset with groups", hint="load(..., group='a regular expression')"
        )
    keys = dataset.group if by_group and dataset.group is not None else dataset.names
    units, unit_of = _units(keys)
    part_of_unit = np.full(len(units), -1, np.int64)
    what = "groups" if by_group else "images"
    for where, members in _strata(dataset, unit_of, len(units), stratified):
        ordered = np.array(sorted(members, key=lambda u: _hash(seed, units[u])), dtype=np.int64)
        sizes = np.bincount(unit_of, minlength=len(units))[ordered]
        part_of_unit[ordered] = _assign(sizes, parts, f"{where} has {len(members)} {what}")
    part_of = part_of_unit[unit_of]
    made = tuple(dataset.subset(np.flatnonzero(part_of == k)) for k in range(len(parts)))
    _complete(dataset, made, stratified)
    return made


def split_classes(dataset: Labelled, held: int, *, seed: int = 0) -> tuple[Labelled, Labelled]:
    """Divide the classes of a dataset: (the others, `held` of them), each with labels from 0 on.

    A hash of seed and class name decides.  Raises UsageError where nothing would be left.
    """
    if not 0 < held < len(dataset.classes):
        raise UsageError(f"{held} of {len(dataset.classes)} classes cannot be held back")
    drawn = set(sorted(dataset.classes, key=lambda name: _hash(seed, name))[:held])
    others, kept = ([n for n in dataset.classes if (n in drawn) is k] for k in (False, True))
    return dataset.of_classes(others), dataset.of_classes(kept)


def _sensible(parts: Sequence[Part]) -> None:
    given = [p for p in parts if p is not None]
    numbers = all(isinstance(p, int | float) and not isinstance(p, bool) for p in given)
    fractions = numbers and all(isinstance(p, float) for p in given)
    counts = numbers and all(isinstance(p, int) for p in given)
    good = bool(parts) and len(parts) - len(given) <= 1 and (fractions or counts)
    if good and given:
        good = min(given) > 0 and (counts or (math.fsum(given) <= 1 + 1e-9))
    if not good:
        raise UsageError(
            f"cannot split into {parts!r}",
            hint="fractions such as (0.8, 0.2), or counts such as (50, None); None is the rest",
        )


def _units(keys: Sequence[str]) -> tuple[list[str], Indices]:
    """What is divided: the different keys, and for each item which it has."""
    number: dict[str, int] = {}
    unit_of = np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64)
    return list(number), unit_of


def _strata(
    dataset: Labelled, unit_of: Indices, n: int, stratified: bool
) -> list[tuple[str, list[int]]]:
    """(what to call it, units), each to be divided on its own."""
    everything = [("the dataset", list(range(n)))]
    if not stratified:
        return everything
    label = np.zeros(n, np.int64)
    label[unit_of] = dataset.labels
    if (label[unit_of] != dataset.labels).any():  # a unit with several classes
        return everything
    return [
        (f"class {name!r}", members.tolist())
        for k, name in enumerate(dataset.classes)
        if len(members := np.flatnonzero(label == k))
    ]


def _hash(seed: int, unit: str) -> bytes:
    return hashlib.sha256(f"{seed}/{unit}".encode("utf-8", "surrogateescape")).digest()


def _assign(sizes: Indices, parts: Sequence[Part], what: str) -> Indices:
    """The part of each unit, units in their drawn order; -1 for none."""
    given = [p for p in parts if p is not None]
    fractions = bool(given) and isinstance(given[0], float)
    total: float = 1.0 if fractions else len(sizes)
    if not fractions and sum(given) > total:
        raise InvalidInput(
            f"{what}, {sum(given)} are asked for", hint="fewer, or fractions such as (0.8, 0.2)"
        )
    rest = total - math.fsum(given)
    ends: NDArray[Any] = np.cumsum([rest if p is None else p for p in parts])
    if fractions:  # a unit goes where its middle lies; this rounds to the nearest
        ends = np.round(ends * sizes.sum(), 6)
        middle: NDArray[Any] = np.cumsum(sizes) - sizes / 2
    else:
        middle = np.arange(len(sizes)) + 0.5
    part = np.searchsorted(ends, middle, side="left").astype(np.int64)
    return np.where(part < len(parts), part, -1)


def _complete(dataset: Labelled, parts: Sequence[Labelled], stratified: bool) -> None:
    present = dataset.counts > 0
    for k, part in enumerate(parts):
        if not len(part):
            raise InvalidInput(
                f"part {k} of the split has no images",
                why=f"there are {len(dataset)} to divide",
                hint="larger fractions, or smaller groups",
            )
        missing = present & (part.counts == 0)
        if stratified and missing.any():
            c = int(missing.argmax())
            raise InvalidInput(
                f"part {k} of the split has no image of class {dataset.classes[c]!r}",
                why=f"the class has {dataset.counts[c]} images",
                hint="larger fractions, more images, or stratified=False",
            )
