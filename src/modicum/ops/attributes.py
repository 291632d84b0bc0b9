"""Attributes read with their types and ranges: a graph may come from a file."""

from __future__ import annotations

from modicum.graph import Node

MOST = 65535  # times a number of channels, it still fits the kernels' 32-bit numbers
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # what float32 holds, nearly


def whole(node: Node, key: str, least: int = 1, most: int = MOST) -> int:
    """A whole number within bounds; else ValueError."""
    return _whole(key, node.attrs[key], least, most)


def wholes(node: Node, key: str, n: int = 2, least: int = 1, most: int = MOST) -> tuple[int, ...]:
    """`n` whole numbers within bounds, 0 for as many as there are; else ValueError."""
    values = node.attrs[key]
    if not isinstance(values, tuple | list) or len(values) != (n or len(values)):
        raise ValueError(f"{key} is {values!r}, not {n} whole numbers")
    return tuple(_whole(key, v, least, most) for v in values)


def number(node: Node, key: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """A number within bounds that float32 can hold; else ValueError."""
    v = node.attrs[key]
    if type(v) not in (int, float) or not least <= v <= most:
        raise ValueError(f"{key} is {v!r}, not a number from {least:g} to {most:g}")
    return float(v)


def flag(node: Node, key: str) -> bool:
    """True or False; else ValueError."""
    if not isinstance(node.attrs[key], bool):
        raise ValueError(f"{key} is {node.attrs[key]!r}, not true or false")
    return bool(node.attrs[key])


def _whole(key: str, v: object, least: int, most: int) -> int:
    if type(v) is not int or not least <= v <= most:
        raise ValueError(f"{key} is {v!r}, not a whole number from {least} to {most}")
    return v
