"""`Labelled`: items with labels, wherever they lie; and the checks on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modicum.errors import InvalidInput
from modicum.tasks.images import Pixels

SHOWN = 10
"""So many broken items are named in one error."""


class Source(Protocol):
    """Where items lie.  `name` is unique and the same on every machine."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read(self, i: int) -> Pixels:
        """Item i as (h, w, c).  Raises InvalidInput."""
        ...


@dataclass(frozen=True, eq=False)
class Labelled:
    """Items in a fixed order, each with a label; item i is ``source.read(index[i])``.

    `labels` (n,) int64 count into `classes`.  `group` says for every item what it belongs to
    besides its class (a drawer, a speaker, an alphabet, a device), or is None.  Subsets share
    the source and keep all classes.  Raises InvalidInput when the parts do not fit together.
    """

    source: Source = field(repr=False)
    index: NDArray[np.int64] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    classes: tuple[str, ...]
    group: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        labels = as_labels(self.labels, len(self.classes))
        index = np.array(self.index, dtype=np.int64)
        if len(labels) != len(index):
            raise InvalidInput(f"{len(index)} items but {len(labels)} labels")
        if self.group is not None and len(self.group) != len(index):
            raise InvalidInput(f"{len(index)} items but {len(self.group)} groups")
        if len(index) and (index.min() < 0 or index.max() >= len(self.source)):
            raise InvalidInput(f"item {index.max()} of {len(self.source)} does not exist")
        if len(set(self.classes)) < len(self.classes):
            twice = next(c for c in self.classes if self.classes.count(c) > 1)
            raise InvalidInput(f"two classes have the name {twice!r}")
        labels.flags.writeable = index.flags.writeable = False
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "index", index)

    def __len__(self) -> int:
        return len(self.index)

    def __str__(self) -> str:
        return f"{len(self)} images of {len(self.classes)} classes"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One per item: the path below the folder of the set, or the number in its array."""
        return tuple(self.source.name(int(i)) for i in self.index)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(classes,): items of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def image(self, i: int) -> Pixels:
        """Item i as (h, w, c), uint8 or float32, not to be written to.  Raises InvalidInput."""
        return self.source.read(int(self.index[i]))

    def subset(self, indices: ArrayLike) -> Labelled:
        """The items at these positions (whole numbers or a mask), in this order."""
        at = np.asarray(indices)
        if at.size == 0:
            at = np.zeros(0, np.int64)
        elif at.dtype == bool and at.shape == (len(self),):
            at = np.flatnonzero(at)
        if at.ndim != 1 or at.dtype.kind not in "iu":
            raise InvalidInput(f"positions have shape {at.shape} and type {at.dtype}")
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise InvalidInput(f"positions from {at.min()} to {at.max()} in {len(self)} items")
        group = None if self.group is None else tuple(self.group[i] for i in at)
        return replace(self, index=self.index[at], labels=self.labels[at], group=group)

    def of_classes(self, names: Sequence[str]) -> Labelled:
        """The items of these classes, in the same order; label k is ``names[k]``.

        Raises InvalidInput for a class that there is not.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise InvalidInput(f"there is no class {unknown[0]!r}", where=_some(self.classes))
        number = np.full(len(self.classes), -1, np.int64)
        for k, name in enumerate(names):
            number[self.classes.index(name)] = k
        part = self.subset(number[self.labels] >= 0)
        return replace(part, labels=number[part.labels], classes=tuple(names))


@dataclass(eq=False)
class Kept:
    """A source that keeps what it has read, up to `limit` bytes; the rest is read again."""

    source: Source
    limit: int
    bytes: int = 0
    kept: dict[int, Pixels] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> Pixels:
        pixels = self.kept.get(i)
        if pixels is None:
            pixels = self.source.read(i)
            pixels.flags.writeable = False
            if self.bytes + pixels.nbytes <= self.limit:
                self.kept[i] = pixels
                self.bytes += pixels.nbytes
        return pixels


def as_labels(y: Any, classes: int | None) -> NDArray[np.int64]:
    """A copy (n,) int64.  Raises InvalidInput for what are not labels of so many classes."""
    try:
        labels = np.asarray(y)
    except Exception as error:
        raise InvalidInput("the labels are not an array of numbers", why=str(error)) from None
    if labels.size == 0:
        return np.zeros(0, np.int64)
    wrong = "labels must be whole numbers" + ("" if classes is None else f" below {classes}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidInput(
            wrong,
            why=f"they have shape {labels.shape} and type {labels.dtype}",
            hint="y.argmax(1) for one-hot labels, y.astype(int) for whole floats",
        )
    bad = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    if bad.any():
        first = int(bad.argmax())
        raise InvalidInput(
            wrong,
            why=f"label {first} is {labels[first]} ({bad.sum()} labels are out of range)",
            hint="number the classes from 0 on, or name all of them: classes=(...)",
        )
    return labels.astype(np.int64)


def check(dataset: Labelled, progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every image once, so that training does not meet a broken one hours later.

    `progress` is called with (images done, images in all).  Raises InvalidInput that names the
    broken images and counts them, and for a dataset without any.
    """
    if not len(dataset):
        raise InvalidInput("the dataset has no images")
    errors: list[InvalidInput] = []
    for i in range(len(dataset)):
        try:
            dataset.image(i)
        except InvalidInput as error:
            errors.append(error)
        if progress is not None:
            progress(i + 1, len(dataset))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        shown = [_line(e) for e in errors[:SHOWN]]
        more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        raise InvalidInput(
            f"{len(errors)} of {len(dataset)} images cannot be used",
            where=[*shown, *more],
            hint="replace them, or leave them out: ignore=(...)",
        )


def _line(error: InvalidInput) -> str:
    why = "; ".join(error.details.get("why", ()))
    return f"{error.what}: {why}" if why else error.what


def same_classes(train: Labelled, test: Labelled) -> None:
    """Raise InvalidInput unless label k means the same class in both, and none has no images."""
    agree(train.classes, test.classes, "the training set", "the test set")
    for what, dataset in (("training", train), ("test", test)):
        if not dataset.counts.all():
            name = dataset.classes[int((dataset.counts == 0).argmax())]
            raise InvalidInput(f"the {what} set has no image of class {name!r}")


def agree(wanted: Sequence[str], found: Sequence[str], one: str, other: str) -> None:
    """Raise InvalidInput unless both name the same classes in the same order."""
    if tuple(wanted) == tuple(found):
        return
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    why = [
        f"only in {where}: {_some(names)}"
        for where, names in ((one, missing), (other, extra))
        if names
    ]
    if not why:
        k = next(k for k, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b)
        why = [f"another order: label {k} is {wanted[k]!r} in {one} and {found[k]!r} in {other}"]
    raise InvalidInput(
        f"the classes of {one} and of {other} differ",
        why=why,
        hint="the same class folders for both; for arrays, labels and names in one order",
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
