"""Image files in class folders, on disk or in a zip."""

from __future__ import annotations

import os
import re
import stat
import threading
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import images
from modicum.tasks.images import Pixels
from modicum.tasks.labelled import Kept, Labelled, agree

MAX_RATIO = 200
"""A large member of an archive that grows more than so many times is taken for a bomb."""

LARGE_FILE, LARGE_ARRAY = 64 << 20, 1 << 30
"""Bytes up to which no ratio is suspicious."""

_JUNK = frozenset({"__MACOSX", "thumbs.db", "desktop.ini", "$RECYCLE.BIN", "@eaDir"})
_PARTS_OF_A_SET = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})


@dataclass(frozen=True)
class Folder:
    """Image files below `root`; `names` are what they are called, `paths` where they lie."""

    root: Path
    paths: tuple[str, ...]
    shrink: int | None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> Pixels:
        path = self.root / self.paths[i]
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait
                raise InvalidInput(f"{path} is not a regular file")
            _small_enough(str(path), info.st_size)
            data = path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read", why=error.strerror) from None
        return images.decode(data, str(path), self.shrink)


class _Archive(threading.local):
    """An open zip per thread and process: a position in a file cannot be shared."""

    process: int = -1
    zip: zipfile.ZipFile

    def get(self, root: Path) -> zipfile.ZipFile:
        if self.process != os.getpid():
            self.zip = zipfile.ZipFile(root)
            self.process = os.getpid()
        return self.zip


@dataclass(frozen=True)
class Zipped:
    """Image files in a zip, as `Folder`."""

    root: Path
    paths: tuple[str, ...]
    shrink: int | None
    names: tuple[str, ...] = ()
    archive: _Archive = field(default_factory=_Archive, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> Pixels:
        where = f"{self.root}/{self.paths[i]}"
        try:
            archive = self.archive.get(self.root)
            entry = archive.getinfo(self.paths[i])
            _small_enough(where, entry.file_size, entry.compress_size)
            data = archive.read(entry)
        except InvalidInput:
            raise
        except Exception as error:  # wrong checksum, encrypted, unknown method, gone
            raise InvalidInput(
                f"{where} cannot be unpacked", why=f"{type(error).__name__}: {error}"
            ) from None
        return images.decode(data, where, self.shrink)

    def __reduce__(self) -> tuple[Any, ...]:
        return Zipped, (self.root, self.paths, self.shrink, self.names)


def _small_enough(where: str, size: int, packed: int | None = None) -> None:
    if size > images.MAX_FILE_BYTES:
        raise InvalidInput(
            f"{where} has {size:,} bytes", why=f"no more than {images.MAX_FILE_BYTES:,} are read"
        )
    if packed is not None:
        no_bomb(where, size, packed, LARGE_FILE)


def no_bomb(where: str, size: int, packed: int, large: int) -> None:
    """Refuse what is larger than `large` and far larger than it is packed."""
    if size > max(large, MAX_RATIO * packed):
        raise InvalidInput(
            f"{where} unpacks from {packed:,} to {size:,} bytes",
            why=f"more than {MAX_RATIO} times its size: a decompression bomb?",
        )


def open_folder(root: Path, shrink: int | None) -> tuple[Folder, list[str]]:
    """The files below a folder, and the folders."""
    files: list[str] = []
    folders: list[str] = []
    around: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise InvalidInput(f"{error.filename} cannot be read", why=error.strerror)

    for at, below, found in os.walk(root, followlinks=True, onerror=fail):
        info = os.stat(at)
        if (info.st_dev, info.st_ino) in around:
            raise InvalidInput(f"{at} is reached twice", why="a link to a folder around or beside")
        around.add((info.st_dev, info.st_ino))
        below[:] = [b for b in below if not _junk(b)]
        here = Path(at).relative_to(root)
        folders += [(here / b).as_posix() for b in below]
        files += [(here / f).as_posix() for f in found]
    return Folder(root, tuple(files), shrink), folders


def open_zip(root: Path, shrink: int | None) -> tuple[Zipped, list[str]]:
    """The entries of a zip; nothing is unpacked to disk, and yet no name may point elsewhere."""
    try:
        with zipfile.ZipFile(root) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise InvalidInput(f"{root} is not a zip that can be read", why=str(error)) from None
    for entry in entries:
        parts = entry.filename.removesuffix("/").split("/")
        if {"", ".", ".."} & set(parts) or "\\" in entry.filename or ":" in parts[0]:
            raise InvalidInput(
                f"{root} has an entry with the name {entry.filename!r}",
                why="names must be relative paths with '/', without '.', '..' and empty parts",
                hint="do not trust the rest of it either",
            )
        if entry.flag_bits & 1:
            raise InvalidInput(f"{root}/{entry.filename} is encrypted", hint="a zip without")
    files = [e.filename for e in entries if not e.is_dir()]
    if len(set(files)) < len(files):
        raise InvalidInput(f"{root} has two entries of the name {_twice(files)!r}")
    return Zipped(root, tuple(files), shrink), [
        e.filename.removesuffix("/") for e in entries if e.is_dir()
    ]


def _junk(part: str) -> bool:
    return part.startswith(".") or part in _JUNK or part.lower() in _JUNK


def _twice(names: Sequence[str]) -> str:
    ordered = sorted(names)
    return next(a for a, b in pairwise(ordered) if a == b)


def of_files(
    files: Folder | Zipped,
    folders: list[str],
    root: Path,
    level: int,
    wanted: tuple[str, ...] | None,
    group: str | None,
    ignore: Sequence[str],
    keep_bytes: int,
) -> Labelled:
    """The images among all `files` and `folders` below `root`, by class folder; see `load`."""

    def ignored(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        return any(fnmatchcase(path, p) or fnmatchcase(name, p) for p in ignore)

    visible = [p for p in files.paths if not any(map(_junk, p.split("/")))]
    listed = [(unicodedata.normalize("NFC", p), p) for p in visible if not ignored(p)]
    found = [(n, p) for n, p in listed if _suffix(n) in images.SUFFIXES]
    if not found:
        raise InvalidInput(
            f"{root} has no images",
            why=f"none of its {len(files.paths)} files ends in {' '.join(sorted(images.SUFFIXES))}",
        )
    strip = _common(n for n, _ in found) if min(_depth(n) for n, _ in found) > level else ""
    for name, path in listed:
        if _suffix(name) not in images.SUFFIXES and _depth(name.removeprefix(strip)) >= level:
            raise InvalidInput(
                f"{root}/{path} lies among the images and is none",
                hint=f"remove it, or ignore=({'*' + (_suffix(name) or path)!r},)",
            )
    found = sorted((n.removeprefix(strip), p) for n, p in found)
    names = tuple(n for n, _ in found)
    if len(set(names)) < len(names):
        raise InvalidInput(f"{root} has two images of the name {_twice(names)!r}")
    if stray := next(((n, p) for n, p in found if _depth(n) < level), None):
        raise InvalidInput(
            f"{root}/{stray[1]} lies in no class folder",
            why=f"a class is named by {level} folder{'s' * (level > 1)}, it has {_depth(stray[0])}",
            hint="one folder per class, with its images; class_level says how deep classes lie",
        )
    of = ["/".join(n.split("/")[:level]) for n in names]
    classes = tuple(sorted(set(of)))
    _no_empty_class(root, visible, folders, strip.count("/"), level)
    if {c.lower() for c in classes} <= _PARTS_OF_A_SET:
        raise InvalidInput(
            f"the classes of {root} would be {', '.join(classes)}",
            why="these look like the parts of a dataset, each with its own class folders",
            hint=f"load each part, beginning with {root / classes[0]}",
        )
    if wanted is not None:
        agree(wanted, classes, "the given classes", str(root))
    number = {name: k for k, name in enumerate(classes)}
    source = type(files)(files.root, tuple(p for _, p in found), files.shrink, names)
    return Labelled(
        Kept(source, keep_bytes),
        np.arange(len(names)),
        np.array([number[c] for c in of], np.int64),
        classes,
        None if group is None else _groups(names, group, root),
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _depth(name: str) -> int:
    """Folders around a file."""
    return name.count("/")


def _common(names: Iterable[str]) -> str:
    """The one folder that all names begin with, as a prefix, or nothing."""
    first = {n.split("/", 1)[0] for n in names}
    return first.pop() + "/" if len(first) == 1 else ""


def _no_empty_class(
    root: Path, files: Sequence[str], folders: Sequence[str], stripped: int, level: int
) -> None:
    """Refuse a folder that names a class, or part of the name, and has no files at all."""
    filled = {"/".join(f.split("/")[:k]) for f in files for k in range(1, f.count("/") + 1)}
    for folder in sorted(set(folders) - filled):
        if folder.count("/") < level + stripped and not any(map(_junk, folder.split("/"))):
            raise InvalidInput(
                f"the class folder {root}/{folder} has no images",
                hint="put images into it, or remove it",
            )


def _groups(names: Sequence[str], pattern: str, root: Path) -> tuple[str, ...]:
    try:
        search = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"group={pattern!r} is not a regular expression", why=str(error)) from None
    found: list[str] = []
    for name in names:
        match = search.search(name)
        text = None if match is None else match[1] if search.groups else match[0]
        if text is None:
            raise InvalidInput(f"group={pattern!r} does not match {name!r} of {root}")
        found.append(text)
    return tuple(found)
