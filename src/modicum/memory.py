"""Program -> offsets in one arena.

Persistent buffers (trained slices, optimiser state, accumulators) come first, one after the
other; the others share the rest as their lifetimes allow.  `place` runs a portfolio of greedy
orders and then improves the best; `verify` checks a placement by replaying the program on a
shadow of the arena and shares no code with `place`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modicum.errors import Bug, InvalidInput
from modicum.lower import Program

ALIGN = 16  # bytes; keeps every buffer on a cache line's and a vector's boundary
IMPROVEMENTS = 300


@dataclass(frozen=True)
class Placement:
    """Byte offsets of every buffer, and the arena's size."""

    offsets: Mapping[str, int]
    arena: int
    persistent: int
    lower_bound: int

    @property
    def gap(self) -> float:
        """How far the arena is above the lower bound, as a fraction of it."""
        return self.arena / self.lower_bound - 1.0


def live_bytes(program: Program, align: int = 1) -> list[int]:
    """Bytes live during each step, every buffer rounded up to a multiple of `align`."""
    live = np.zeros(len(program.steps) + 1, dtype=np.int64)
    for name, (first, last) in program.lifetimes.items():
        size = -(-program.buffers[name].bytes // align) * align
        live[first] += size
        live[last + 1] -= size
    return [int(n) for n in np.cumsum(live)[:-1]]


def lower_bound(program: Program) -> int:
    """No placement is smaller than the most bytes that are live during one step."""
    return max(live_bytes(program), default=0)


def place(program: Program) -> Placement:
    """Offsets for all buffers; deterministic."""
    spans = program.lifetimes
    size = {name: _aligned(program.buffers[name].bytes) for name in spans}
    persistent = [n for n in spans if program.buffers[n].persistent]
    dynamic = [n for n in spans if not program.buffers[n].persistent]
    offsets, base = {}, 0
    for name in sorted(persistent, key=list(program.buffers).index):
        offsets[name] = base
        base += size[name]
    reachable = max(live_bytes(program, ALIGN), default=0) - base
    shared = _best_offsets(dynamic, size, spans, reachable)
    offsets.update({name: base + offset for name, offset in shared.items()})
    end = max((offsets[n] + program.buffers[n].bytes for n in offsets), default=0)
    return Placement(offsets, end, base, lower_bound(program))


def _best_offsets(
    names: list[str], size: Mapping[str, int], spans: Mapping[str, tuple[int, int]], bound: int
) -> dict[str, int]:
    """The best of the portfolio, then improved by moving what lies at the top forward."""
    conflicts = _conflicts(names, spans)

    def length(n: str) -> int:
        return spans[n][1] - spans[n][0] + 1

    keys: list[Callable[[str], tuple[int, ...]]] = [
        lambda n: (-size[n], spans[n][0]),
        lambda n: (-size[n] * length(n), spans[n][0]),
        lambda n: (-length(n), -size[n]),
        lambda n: (spans[n][0], -size[n]),
        lambda n: (-spans[n][1], -size[n]),
        lambda n: (-sum(size[m] for m in conflicts[n]), -size[n]),
    ]
    tried = []
    for key in keys:
        order = sorted(names, key=key)
        offsets = _fill(order, size, conflicts) or {}
        tried.append((_top(offsets, size), order, offsets))
    top, order, offsets = min(tried, key=lambda t: t[0])
    rng = random.Random(0)
    for _ in range(IMPROVEMENTS if len(names) < 2000 else 0):
        if top <= bound:
            break
        highest = [n for n in names if offsets[n] + size[n] == top]
        moved = rng.choice(highest)
        position = order.index(moved)
        first = rng.randrange(position + 1)  # what comes before it stays where it is
        trial = [*order[:first], moved, *(n for n in order[first:] if n != moved)]
        trial_offsets = _fill(trial, size, conflicts, {n: offsets[n] for n in order[:first]}, top)
        if trial_offsets is not None:
            top, order, offsets = _top(trial_offsets, size), trial, trial_offsets
    return offsets


def _conflicts(names: list[str], spans: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    conflicts: dict[str, list[str]] = {n: [] for n in names}
    for i, a in enumerate(names):
        for b in names[:i]:
            if spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                conflicts[a].append(b)
                conflicts[b].append(a)
    return conflicts


def _fill(
    order: list[str],
    size: Mapping[str, int],
    conflicts: Mapping[str, list[str]],
    placed: Mapping[str, int] | None = None,
    most: float = math.inf,
) -> dict[str, int] | None:
    """Each buffer at the lowest offset where it meets no placed buffer that lives with it.

    `placed` are the first of `order`, already there.  None if a buffer would end above `most`.
    """
    offsets = dict(placed or {})
    for name in order[len(offsets) :]:
        taken = sorted((offsets[m], offsets[m] + size[m]) for m in conflicts[name] if m in offsets)
        at = 0
        for start, end in taken:
            if start - at >= size[name]:
                break
            at = max(at, end)
        if at + size[name] > most:
            return None
        offsets[name] = at
    return offsets


def _top(offsets: Mapping[str, int], size: Mapping[str, int]) -> int:
    return max((offsets[n] + size[n] for n in offsets), default=0)


def _aligned(n: int) -> int:
    return (n + ALIGN - 1) // ALIGN * ALIGN


def verify(program: Program, offsets: Mapping[str, int], arena: int) -> None:
    """Replay the program on a shadow arena whose bytes remember who wrote them.

    Raises InvalidInput when a buffer lies outside the arena or off its alignment, and when a
    step would read bytes that another buffer has overwritten.  Raises Bug when the program reads
    what nothing wrote.
    """
    if set(offsets) != set(program.lifetimes):
        odd = sorted(set(offsets) ^ set(program.lifetimes))[:4]
        raise InvalidInput("the placement and the program have different buffers", where=str(odd))
    _check_arena(arena, _most_bytes(program))
    owner = np.full(-(-arena // 4), -1, dtype=np.int32)
    number = {name: i for i, name in enumerate(offsets)}

    def words(name: str) -> slice:
        return slice(offsets[name] // 4, -(-(offsets[name] + program.buffers[name].bytes) // 4))

    for name, offset in offsets.items():
        if offset < 0 or offset % 4 or offset + program.buffers[name].bytes > arena:
            raise InvalidInput(f"buffer {name!r} lies outside the arena or unaligned")
    written = {program.input_buffer}
    owner[words(program.input_buffer)] = number[program.input_buffer]
    for name, buffer in program.buffers.items():
        if buffer.persistent:
            if (owner[words(name)] != -1).any():
                raise InvalidInput(f"persistent buffer {name!r} overlaps another")
            owner[words(name)] = number[name]
            written.add(name)
    for i, step in enumerate(program.steps):
        for name in sorted(step.reads):
            if name not in written:
                raise Bug(f"step {i} ({step.node}) reads {name!r}, which nothing wrote")
            if (owner[words(name)] != number[name]).any():
                _overwritten(program, i, name)
        for name in sorted(step.writes):
            owner[words(name)] = number[name]
            written.add(name)
        for name in sorted(step.reads | step.writes):
            if (owner[words(name)] != number[name]).any():
                _overwritten(program, i, name)
    for name, buffer in program.buffers.items():
        if buffer.persistent and (owner[words(name)] != number[name]).any():
            raise InvalidInput(f"persistent buffer {name!r} is overwritten")


def verify_together(placed: Sequence[tuple[Program, Mapping[str, int]]], arena: int) -> None:
    """Verify the programs of one plan, and that what persists lies at one place in all of them.

    Raises as `verify`.
    """
    _check_arena(arena, max(_most_bytes(program) for program, _ in placed))
    homes = []
    for program, offsets in placed:
        verify(program, offsets, min(arena, _most_bytes(program)))
        lasting = (b for b in program.buffers.values() if b.persistent)
        homes.append({b.name: (offsets[b.name], b.bytes) for b in lasting})
    for home in homes[1:]:
        if home != homes[0]:
            odd = sorted(n for n in home.keys() | homes[0].keys() if home.get(n) != homes[0].get(n))
            raise InvalidInput(
                f"persistent buffer {odd[0]!r} is not at the same place in every inner step",
                hint="make the plan again",
            )


def _most_bytes(program: Program) -> int:
    """A placement without any sharing."""
    return sum(b.bytes + ALIGN for b in program.buffers.values())


def _check_arena(arena: int, most: int) -> None:
    if not 0 <= arena <= most:
        raise InvalidInput(f"an arena of {arena} bytes is not that of these buffers")


def persistent_bytes(program: Program, offsets: Mapping[str, int]) -> int:
    """The bytes at the start of the arena that live on from step to step."""
    return max((offsets[b.name] + b.bytes for b in program.buffers.values() if b.persistent),
               default=0)  # fmt: skip


def _overwritten(program: Program, i: int, name: str) -> None:
    raise InvalidInput(
        f"the placement lets another buffer overwrite {name!r}",
        where=f"step {i}, {program.steps[i].phase} of {program.steps[i].node}",
        hint="make the plan again",
    )
