"""`load`: labelled images from folders, zips, .npz files, arrays and map-style datasets."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.errors import InvalidInput, UsageError
from modicum.tasks.files import Folder, Zipped, of_files, open_folder, open_zip
from modicum.tasks.images import Layout
from modicum.tasks.labelled import Labelled
from modicum.tasks.mapped import of_map
from modicum.tasks.stacked import of_arrays, of_npz


def load(
    source: Any,
    *,
    class_level: int = 1,
    classes: Sequence[str] | None = None,
    group: str | None = None,
    ignore: Sequence[str] = (),
    shrink: int | None = None,
    keep_bytes: int = 1 << 30,
    layout: Layout | None = None,
) -> Labelled:
    """Labelled images, in an order that does not depend on the file system.

    `source` is one of

    - a folder with a folder per class, or a zip of one, read in place.  Where all images lie
      below one common folder, that is not counted.  A class is named by its first `class_level`
      folders; deeper ones belong to it.  Images are decoded when they are first used;
    - an ``.npz`` with ``x`` (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or floats, with ``y``
      (n,), and, if you like, names in ``classes`` and ``group`` (n,); or a pair (x, y);
    - a map-style dataset, as of torch: ``d[i]`` is (image, label), ``len(d)`` is finite.  Labels
      come from ``d.targets`` and names from ``d.classes`` where it has them.  Transforms run
      once, when an item is first read: leave random ones out.

    `classes`: the names that must be there, such as those of the training set.  `group`: a
    regular expression, searched in the path of an image below the set; its first group, or all of
    it, is the item's group.  `ignore`: patterns (``*.csv``) of paths to leave out.  `shrink`:
    images whose shorter side is longer become so small when they are read.  `keep_bytes`: how
    much decoded data to keep.  `layout`: of arrays, where their shape does not tell.

    Raises InvalidInput for what is missing, broken, unlabelled or not an image, with its name.
    """
    if class_level < 1 or keep_bytes < 0 or (shrink is not None and shrink < 1):
        raise UsageError(
            f"class_level={class_level}, shrink={shrink}, keep_bytes={keep_bytes} is out of range"
        )
    names = None if classes is None else tuple(classes)
    if isinstance(source, tuple) and len(source) == 2:
        return of_arrays(source[0], source[1], names, None, layout, "the arrays")
    if not isinstance(source, str | os.PathLike):
        return of_map(source, names, layout, keep_bytes)
    path = Path(source)
    if not os.path.exists(path):
        raise InvalidInput(f"{str(path)!r} does not exist", hint=f"paths count from {Path.cwd()}")
    if path.suffix.lower() == ".npz":
        return of_npz(path, names, layout)
    files: Folder | Zipped
    if path.is_dir():
        files, empty = open_folder(path, shrink)
    elif zipfile.is_zipfile(path):
        files, empty = open_zip(path, shrink)
    else:
        raise InvalidInput(
            f"{path} is neither a folder, a zip nor an .npz",
            why="a zip that is cut off is none" if path.suffix.lower() == ".zip" else None,
            hint="a folder of class folders, a zip of one, or an .npz with x and y",
        )
    return of_files(files, empty, path, class_level, names, group, ignore, keep_bytes)
