"""Sizes, counts and shares as text, and sizes from text.

Sizes are in powers of 1024 throughout. Datasheets write "256 KB" for 262,144 bytes, so
KB, K and KiB all mean 1024 here when read, and only KiB is ever printed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator

from modicum.errors import UsageError

__all__ = ["Size", "count", "duration", "kib", "parse_size", "percent", "rate", "size"]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmg])?(?:i?b)?)", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}


def kib(n: int | float) -> str:
    """Return `n` bytes in KiB, always KiB, so that columns of figures compare.

    >>> kib(525312)
    '513.0 KiB'
    """
    return f"{n / 1024:,.1f} KiB"


def size(n: int | float) -> str:
    """Return `n` bytes in the unit that reads best: a larger one from 10 of it, or if it is whole.

    >>> size(640), size(1_048_576), size(6_190_080), size(16_777_217)
    ('640 B', '1.0 MiB', '6,045.0 KiB', '16.0 MiB')
    """
    for unit, bytes_ in (("GiB", 1024**3), ("MiB", 1024**2)):
        if abs(n) >= 10 * bytes_ or (n != 0 and n % bytes_ == 0):
            return f"{n / bytes_:,.1f} {unit}"
    return kib(n) if abs(n) >= 1024 else f"{n:,.0f} B"


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` says; KB, K and KiB are all 1024 bytes.

    Raises UsageError where `text` is not a size, or not a whole number of bytes.

    >>> parse_size("256KB"), parse_size("1 MiB"), parse_size("65536"), parse_size("0.5k")
    (262144, 1048576, 65536, 512)
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is not None:
        exact = Fraction(match[1]) * _FACTOR[(match[2] or "").lower()]
        if exact.denominator == 1:
            return int(exact)
    raise UsageError(
        f"{text!r} is not a size.",
        why="a size is a whole number of bytes, or a number with KB, MB or GB (of 1024)",
        hint="256KB, 1MiB or 65536",
    )


def _positive(size: int | str) -> int | str:
    if parse_size(size) < 1:
        raise UsageError(f"{size!r} is no memory at all", hint="a size of 1 byte or more")
    return size


Size = Annotated[int | str, AfterValidator(_positive)]
"""A field of bytes, as a number or in words: see `parse_size`."""


def count(n: int | float) -> str:
    """Return a count with three digits or so: plain below 10,000, then k, M, G, T.

    >>> count(9_999), count(22_480_000), count(31_500)
    ('9,999', '22.5 M', '31.5 k')
    """
    if abs(n) < 10_000:
        return f"{n:,.0f}"
    for unit in ("k", "M", "G"):
        n /= 1000
        if abs(n) < 999.95:
            return f"{n:.1f} {unit}"
    return f"{n / 1000:,.1f} T"


def rate(hertz: int | float) -> str:
    """Return a clock rate.

    >>> rate(64_000_000), rate(1_500_000_000)
    ('64 MHz', '1.5 GHz')
    """
    return f"{hertz / 1e9:g} GHz" if hertz >= 1e9 else f"{hertz / 1e6:g} MHz"


def percent(share: float) -> str:
    """Return a share of 1 as percent.

    >>> percent(0.8625)
    '86.2 %'
    """
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return a time span in the unit that reads best.

    >>> duration(0.0123), duration(4.2), duration(95)
    ('12.3 ms', '4.2 s', '1 min 35 s')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
