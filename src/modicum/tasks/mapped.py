"""Map-style datasets, as of torch: `d[i]` is (image, label)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput
from modicum.tasks import images
from modicum.tasks.images import Layout, Pixels
from modicum.tasks.labelled import Kept, Labelled, Source, agree
from modicum.tasks.stacked import array_labels, every_class, numbered


@dataclass(frozen=True)
class Mapped:
    """The images of a map-style dataset; the labels must stay those of `labels`."""

    data: Any
    labels: NDArray[np.int64]
    layout: Layout | None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> Pixels:
        pixels, label = _item(self.data, i, self.layout)
        if label != self.labels[i]:
            raise InvalidInput(
                f"item {i} of the dataset has label {label} now and {self.labels[i]} before",
                hint="labels must not change, and `targets` must be those that items come with",
            )
        return pixels


def _item(data: Any, i: int, layout: Layout | None) -> tuple[Pixels, int]:
    where = f"item {i} of the dataset"
    try:
        item = data[i]
    except Exception as error:
        raise InvalidInput(
            f"{where} cannot be read", why=f"{type(error).__name__}: {error}"
        ) from None
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InvalidInput(f"{where} is not a pair (image, label)", why=f"it is {_kind(item)}")
    label = np.asarray(item[1])
    if label.size != 1 or label.dtype.kind not in "iu":
        raise InvalidInput(
            f"{where} has a label that is not a whole number", why=f"it is {item[1]!r:.80}"
        )
    return images.as_pixels(item[0], f"the image of {where}", layout), int(label.reshape(()))


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def of_map(
    data: Any, wanted: tuple[str, ...] | None, layout: Layout | None, keep_bytes: int
) -> Labelled:
    """The items of `data`; its labels are read now, its images when they are needed."""
    what = f"the dataset {type(data).__name__}"
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InvalidInput(
            f"cannot load {_kind(data)}",
            hint="a path, a pair of arrays (x, y), or a dataset with len() and [i]",
        )
    n = len(data)
    if not n:
        raise InvalidInput(f"{what} has no items")
    kept: dict[int, Pixels] = {}
    targets = getattr(data, "targets", None)
    if targets is None:
        labels = _read_labels(data, n, layout, kept, keep_bytes)
    else:
        labels = array_labels(targets, n, None, f"targets of {what}")
    names = getattr(data, "classes", None)
    if names is not None:
        names = tuple(str(name) for name in names)
        if wanted is not None:
            agree(wanted, names, "the given classes", what)
    names = names or wanted or numbered(labels)
    labels = array_labels(labels, n, names, what)
    source: Source = Kept(
        Mapped(data, labels, layout), keep_bytes, sum(p.nbytes for p in kept.values()), kept
    )
    return every_class(Labelled(source, np.arange(n), labels, names), what)


def _read_labels(
    data: Any, n: int, layout: Layout | None, kept: dict[int, Pixels], keep_bytes: int
) -> NDArray[np.int64]:
    """The labels of a dataset that only items know; their images are kept as room allows."""
    labels = np.zeros(n, np.int64)
    room = keep_bytes
    for i in range(n):
        pixels, labels[i] = _item(data, i, layout)
        if pixels.nbytes <= room:
            pixels.flags.writeable = False
            kept[i] = pixels
            room -= pixels.nbytes
    return labels
