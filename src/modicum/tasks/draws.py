"""Random numbers that depend on what they are for, not on who asked before.

A draw is a hash of (seed, stream, epoch, item): the same in any order, in any worker, on any
machine and with any version of numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

ORDER, AUGMENT, TASK, MEMBERS, GROUPS, PSEUDO = 1, 2, 3, 4, 5, 6
"""Streams: draws for one purpose say nothing about those for another."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def uniform(
    seed: int, stream: int, epoch: int, items: NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Numbers in [0, 1), shape (items, draws)."""
    return np.asarray((_words(seed, stream, epoch, items, draws) >> np.uint64(11)) * 2.0**-53)


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """An order of 0 .. n-1."""
    keys = _words(seed, ORDER, epoch, np.arange(n, dtype=np.int64), 1)[:, 0]
    return np.argsort(keys, kind="stable").astype(np.int64)


def _words(seed: int, stream: int, epoch: int, items: NDArray[np.int64], draws: int) -> Words:
    key = np.zeros(1, np.uint64)
    for word in (seed, stream, epoch):
        key = _mix(key ^ np.uint64(word & _MASK))
    keys = _mix(key ^ items.astype(np.uint64))
    return _mix(keys[:, None] ^ np.arange(draws, dtype=np.uint64)[None])


def _mix(x: Words) -> Words:
    """One step of SplitMix64 (Steele, Lea, Flood 2014) from state x; arithmetic modulo 2^64."""
    z: Any = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
