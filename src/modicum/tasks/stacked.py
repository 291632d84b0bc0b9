"""Images and labels in arrays, and in .npz files."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput
from modicum.tasks import images
from modicum.tasks.files import LARGE_ARRAY, no_bomb
from modicum.tasks.images import Layout, Pixels
from modicum.tasks.labelled import Labelled, agree, as_labels

MAX_ARRAY_BYTES = 16 << 30
"""An array of an .npz that unpacks to more is refused unread."""


@dataclass(frozen=True)
class Stacked:
    """Images of one array (n, h, w, c)."""

    x: NDArray[Any]

    def __len__(self) -> int:
        return len(self.x)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> Pixels:
        pixels: Pixels = self.x[i]
        pixels.flags.writeable = False  # of this view
        return pixels


def of_arrays(
    x: Any,
    y: Any,
    names: tuple[str, ...] | None,
    group: tuple[str, ...] | None,
    layout: Layout | None,
    where: str,
) -> Labelled:
    """Images x, (n, h, w) or (n, h, w, c) or (n, c, h, w), with labels y (n,)."""
    try:
        x = np.asarray(x)
    except Exception as error:
        raise InvalidInput(f"x of {where} is not an array of numbers", why=str(error)) from None
    if x.ndim < 3 or not len(x):
        raise InvalidInput(
            f"x of {where} has shape {x.shape}",
            hint="(n, height, width), (n, height, width, channels) or (n, channels, height, width)",
        )
    x = images.channels_last(x, f"x of {where}", layout, batch=1)
    labels = array_labels(y, len(x), names, where)
    names = names or numbered(labels)
    dataset = Labelled(Stacked(_finite(x, where)), np.arange(len(x)), labels, names, group)
    return every_class(dataset, where)


def _finite(x: NDArray[Any], where: str) -> NDArray[Any]:
    """As images.numbers, but naming the image."""
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(x.astype(np.float32, copy=False)).reshape(len(x), -1).all(1)
        if bad.any():
            raise InvalidInput(
                f"image {bad.argmax()} of {where} has values that are not finite",
                why=f"{bad.sum()} images have some",
            )
    return images.numbers(x, f"x of {where}")


def array_labels(y: Any, n: int, names: tuple[str, ...] | None, where: str) -> NDArray[np.int64]:
    """(n,) int64 labels of n images, within the names if there are any."""
    try:
        shape = np.shape(y)
    except Exception:
        shape = ()
    if len(shape) == 1 and shape[0] != n:
        raise InvalidInput(f"{where}: {n} images but {shape[0]} labels")
    try:
        return as_labels(y, None if names is None else len(names))
    except InvalidInput as error:
        error.what = f"{where}: {error.what}"
        raise


def numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Names for classes without: their numbers, with zeros in front, so that they are sorted."""
    n = int(labels.max()) + 1
    if n > 2 * len(labels) + 1000:
        raise InvalidInput(
            f"the largest label is {n - 1}, of {len(labels)} labels",
            hint="number the classes from 0 on",
        )
    return tuple(f"{k:0{len(str(n - 1))}}" for k in range(n))


def every_class(dataset: Labelled, where: str) -> Labelled:
    """The dataset, unless one of its classes has no image."""
    if not dataset.counts.all():
        k = int((dataset.counts == 0).argmax())
        raise InvalidInput(
            f"{where}: no image has label {k} (class {dataset.classes[k]!r})",
            why=f"{(dataset.counts == 0).sum()} of {len(dataset.classes)} classes are empty",
            hint="number the classes from 0 on, without gaps; load everything, then take a subset",
        )
    return dataset


def of_npz(path: Path, wanted: tuple[str, ...] | None, layout: Layout | None) -> Labelled:
    """An .npz with x and y, and perhaps classes and group."""
    arrays = _read_npz(path)
    if missing := {"x", "y"} - set(arrays):
        raise InvalidInput(
            f"{path} has no array {' and no '.join(sorted(missing))}",
            why=f"it has {', '.join(sorted(arrays)) or 'none'}",
            hint="np.savez(path, x=images, y=labels)",
        )
    names = _strings(arrays.get("classes"), f"classes of {path}")
    if names is not None and wanted is not None:
        agree(wanted, names, "the given classes", str(path))
    group = _strings(arrays.get("group"), f"group of {path}")
    return of_arrays(arrays["x"], arrays["y"], names or wanted, group, layout, str(path))


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    wanted = {f"{name}.npy" for name in ("x", "y", "classes", "group")}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename in wanted:
                    where = f"{path}/{entry.filename}"
                    no_bomb(where, entry.file_size, entry.compress_size, LARGE_ARRAY)
                    _no_lie(archive, entry, path)
        with np.load(path, allow_pickle=False) as found:
            return {k: found[k] for k in found.files if f"{k}.npy" in wanted}
    except InvalidInput:
        raise
    except Exception as error:  # not a zip, cut off, pickled, too large
        raise InvalidInput(
            f"{path} is not an .npz that can be read",
            why=f"{type(error).__name__}: {error}",
            hint="np.savez(path, x=images, y=labels), with arrays of numbers",
        ) from None


def _no_lie(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Compare the shape that an array claims with its bytes, before room is made for it."""
    with archive.open(entry) as member:
        major = np.lib.format.read_magic(member)[0]
        read = np.lib.format.read_array_header_1_0
        shape, _, dtype = (read if major == 1 else np.lib.format.read_array_header_2_0)(member)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size > min(entry.file_size, MAX_ARRAY_BYTES):
        raise InvalidInput(
            f"{entry.filename} of {path} claims {size:,} bytes and has {entry.file_size:,}",
            why="cut off, or made up; and more than 16 GiB are not read",
        )


def _strings(value: NDArray[Any] | None, what: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if value.ndim != 1 or value.dtype.kind not in "Uiu":
        raise InvalidInput(f"{what} has shape {value.shape} and type {value.dtype}", hint="names")
    return tuple(str(v) for v in value)
