"""Frozen layers take samples a few at a time: where they wait, and what that holds at most.

What takes no part in the backward pass need not see a batch at once.  Without norms that use the
statistics of the batch a few samples pass all frozen layers, and what the others read is kept of
them.  Such a norm must have seen every sample before the first one may go on.  So the samples pass
once for each norm, up to it, for its statistics, and once more; between two passes they wait at a
*cut*.  A cut right before the norm computes nothing twice and holds what the norm reads; one
further back, where there is less to hold, has what lies between computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modicum.graph import Node
from modicum.lower import Program
from modicum.ops import OPS


@dataclass(frozen=True)
class Pass:
    """Samples go on from a cut through `nodes`; behind the first `kept` of them is the next cut.

    `holds` are the values that a sample waits with there; behind the last pass all that the other
    layers read.  `norm` is what the samples pass for: the statistics of what it reads.
    `overwriting` are nodes that may write over their input.
    """

    nodes: tuple[Node, ...]
    kept: int
    holds: tuple[str, ...]
    norm: Node | None
    overwriting: frozenset[str]


@dataclass(frozen=True)
class Streaming:
    """The passes of the frozen layers in a step, `chunk` samples at a time.

    peak: bytes that they hold at most, the samples themselves included, which stay where they are.
    forward, backward: those that the other layers hold at most, which take all samples at once.
    again: MACs of one sample that are computed twice.
    """

    chunk: int
    passes: tuple[Pass, ...]
    peak: int
    forward: int
    backward: int
    again: int


TWICE = 0.25
"""The share of a step's forward MACs that may be computed twice."""


def streaming(
    program: Program, samples: int, chunk: int = 1, batch_norms: bool = True, twice: float = TWICE
) -> Streaming:
    """The passes of a batch of `samples` with the smallest peak, and of these with the fewest MACs.

    At most a share of `twice` of the forward MACs is computed twice, and none for a peak below what
    the other layers hold anyway.  Without `batch_norms` norms use their running statistics, as in
    prediction.
    """
    frozen = _Frozen(program, samples, min(chunk, samples), batch_norms)
    others = [0, 0]
    for step, held in zip(program.steps, dynamic_by_step(program, samples), strict=True):
        part = 0 if step.phase in ("forward", "save") else 1
        if part or step.node not in frozen.names:
            others[part] = max(others[part], held)
    limit = twice * sum(m.forward for m in program.macs.values())
    ways = [way for way in frozen.ways() if way[1] <= limit]
    peak, again, passes = min(ways, key=lambda way: (max(way[0], *others), way[1]))
    return Streaming(frozen.chunk, passes, peak, others[0], others[1], again)


def dynamic_by_step(program: Program, samples: int) -> list[int]:
    """Bytes that each step of a program holds for so many samples at once, beside weights,
    optimiser state and accumulators.

    A gradient of a weight is there once.
    """
    params = program.graph.params
    changes = [0] * (len(program.steps) + 1)
    for name, (first, last) in program.lifetimes.items():
        buffer = program.buffers[name]
        if buffer.persistent:
            continue
        once = buffer.value in params or buffer.kind == "workspace"
        size = buffer.bytes * (1 if once else samples)
        changes[first] += size
        changes[last + 1] -= size
    held, now = [], 0
    for change in changes[:-1]:
        now += change
        held.append(now)
    return held


_Way = tuple[int, int, tuple[Pass, ...]]
"""Of passing up to a norm: the peak, MACs that are computed twice, and the passes."""


def _best(ways: Iterable[_Way]) -> list[_Way]:
    """Without those that another one beats or equals in both costs."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: way[:2]):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


class _Frozen:
    """The frozen layers of a program: a chain of positions, each behind so many of them."""

    def __init__(self, program: Program, samples: int, chunk: int, batch_norms: bool) -> None:
        self.graph, self.macs = program.graph, program.macs
        self.samples, self.chunk, self.batch_norms = samples, chunk, batch_norms
        self.nodes = tuple(n for n in self.graph.nodes if not program.wanted[n.name].any)
        self.names = frozenset(n.name for n in self.nodes)
        stops = [i for i, n in enumerate(self.nodes) if OPS[n.op].states and batch_norms]
        self.stops = [*stops, len(self.nodes)]
        self.waiting = [self._read_behind(at) for at in range(len(self.nodes) + 1)]
        statistics = sum(8 * self.graph.shape(self.nodes[i].name)[1] for i in stops)
        self.always = samples * self.graph.values[self.graph.input].bytes + statistics
        self._most: dict[tuple[int, int, int], int] = {}

    def ways(self) -> list[_Way]:
        """To the end: those of which no other has both a smaller peak and fewer MACs, found by
        dynamic programming over the cuts before each norm."""
        ways: dict[int, list[_Way]] = {0: [(0, 0, ())]}
        before = -1
        for stop in self.stops:
            found: dict[int, list[_Way]] = {}
            for cut, to_here in ways.items():
                for to in self._cuts(cut, before, stop):
                    longer = [self._longer(way, cut, to, stop) for way in to_here]
                    found[to] = _best([*found.get(to, ()), *longer])
            ways, before = found, stop
        return ways[len(self.nodes)]

    def _cuts(self, cut: int, before: int, stop: int) -> Iterator[int]:
        """Where samples may wait for a norm: still where they do, or behind the norm before."""
        if stop == len(self.nodes):
            return iter((stop,))
        return iter(sorted({cut, *range(max(cut, before + 1), stop + 1)}))

    def _longer(self, way: _Way, cut: int, to: int, stop: int) -> _Way:
        """A way with one more pass: from a cut to another and on to the norm at `stop`."""
        peak, again, passes = way
        last = stop == len(self.nodes)
        made = Pass(
            nodes=self.nodes[cut:stop],
            kept=to - cut,
            holds=tuple(sorted(v for v in self.waiting[to] if v != self.graph.input)),
            norm=None if last else self.nodes[stop],
            overwriting=frozenset(
                self.nodes[i].name for i in range(cut, stop) if self._overwrites(i, cut, to)
            ),
        )
        twice = sum(self.macs[n.name].forward for n in self.nodes[to:stop])
        return max(peak, self._peak(cut, to, stop)), again + twice, (*passes, made)

    def _peak(self, cut: int, to: int, stop: int) -> int:
        """Bytes held at most while samples pass: the others wait at `cut`, or already at `to`."""
        others = self.samples - self.chunk
        moved = self.samples if stop == len(self.nodes) else others  # into one tensor at the end
        waits = max(others * self._bytes(self.waiting[cut]), moved * self._bytes(self.waiting[to]))
        return self.always + waits + self.chunk * self._working(cut, to, stop)

    def _working(self, cut: int, to: int, stop: int) -> int:
        """Bytes of a sample that is on its way, at most, with what it will wait with."""
        if (cut, to, stop) in self._most:
            return self._most[cut, to, stop]
        most = self._bytes(self.waiting[cut])
        for i in range(cut, stop):
            held = self.waiting[i] | self.waiting[i + 1] | self._kept(i, cut, to)
            size = self._bytes(held)
            if self._overwrites(i, cut, to):
                size -= self.graph.values[self.nodes[i].name].bytes
            most = max(most, size)
        self._most[cut, to, stop] = most
        return most

    def _overwrites(self, i: int, cut: int, to: int) -> bool:
        """Whether node i may write over its input, which nothing reads or holds any more."""
        node = self.nodes[i]
        affine = node.op == "batch_norm" or (OPS[node.op].states and self.batch_norms)
        if not affine and (node.op != "clamp" or node.attrs.get("sign")):
            return False
        kept = self.waiting[i + 1] | self._kept(i, cut, to)
        homes = {self._home(v) for v in kept} | {self.graph.input}
        return self._home(node.inputs[0]) not in homes

    def _kept(self, i: int, cut: int, to: int) -> frozenset[str]:
        """What node i must leave to a sample, beside what later nodes of the pass read."""
        return self.waiting[to] if to == cut or i >= to else frozenset()

    def _read_behind(self, at: int) -> frozenset[str]:
        """Values before a position that are read behind it, or by the other layers."""
        behind = {n.name for n in self.nodes[at:]}
        made = [self.graph.input, *(n.name for n in self.nodes[:at])]
        return frozenset(
            v
            for v in made
            if v == self.graph.output
            or any(n.name in behind or n.name not in self.names for n in self.graph.consumers[v])
        )

    def _bytes(self, values: Iterable[str]) -> int:
        """Of one sample's values, views counted once and the input not at all."""
        homes = {self._home(v) for v in values} - {self.graph.input}
        return sum(self.graph.values[v].bytes for v in homes)

    def _home(self, value: str) -> str:
        """The value whose memory it is."""
        while (by := self.graph.by_name.get(value)) is not None and OPS[by.op].view(self.graph, by):
            value = by.inputs[0]
        return value
