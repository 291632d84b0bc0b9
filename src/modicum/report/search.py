"""Contributions of biases and weights, and the scheme that a search made of them: data and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from modicum.backward_cost import BackwardCost
from modicum.graph import Frozen
from modicum.methods import SparseUpdate
from modicum.optim import Optimizer
from modicum.report.comparison import save_all, write
from modicum.report.pictures.contributions import Mark, Row, picture
from modicum.report.runs import plain
from modicum.report.tasks import Estimate
from modicum.tasks import EpisodeRule, FixedEpisodes, Preprocess
from modicum.units import count, kib

VERSION: Literal[1] = 1


class Contributions(Frozen):
    """How much more accurate a network gets on few-shot tasks by what it trains.

    layers: weights by name with their shapes, in order, without a head's.  base: accuracy of
    prototypes alone.  biases: number k -> gain over that from training the biases of the last k
    layers.  weights: number of a layer -> share r of its input channels -> gain from training
    those too, over the biases of the last `covering(layer)` layers.  Gains are means of paired
    differences over `tasks` tasks of each domain; `failed` of all runs diverged, and count with
    the accuracy of a guess.
    """

    version: Literal[1] = VERSION
    layers: dict[str, tuple[int, ...]]
    domains: tuple[str, ...]
    tasks: int
    rule: EpisodeRule
    tune: dict[str, Any]
    optimizer: Optimizer
    preprocess: Preprocess
    seed: int
    base: Estimate
    biases: dict[int, Estimate]
    weights: dict[int, dict[float, Estimate]]
    failed: int = 0

    def covering(self, layer: int) -> int:
        """The smallest k in `biases` that has the layer among the last k."""
        return min(k for k in self.biases if len(self.layers) - k <= layer)

    def gain(self, biases: int, shares: Mapping[int, float]) -> float:
        """dacc_b[k] + sum_i dacc_W[i, r_i] of a scheme."""
        parts = [self.weights[i][share].mean for i, share in shares.items()]
        return self.biases[biases].mean + sum(parts)

    def name(self, layer: int) -> str:
        return plain(list(self.layers)[layer]).removeprefix("backbone.").removesuffix(".weight")

    def save(self, folder: Path) -> None:
        write(folder / "contributions.json", (self.model_dump_json(indent=1) + "\n").encode())

    def __str__(self) -> str:
        shares = sorted({r for by in self.weights.values() for r in by}, reverse=True)
        names = list(self.layers)
        heads = ["layer", "gain in points", *map(share_text, shares), "biases from here on"]
        rows = []
        for i in range(len(names) - max(self.biases), len(names)):
            gains = [self.weights.get(i, {}).get(r) for r in shares]
            cells = [*gains, self.biases.get(len(names) - i)]
            shown = ["-" if e is None else e.signed for e in cells]
            rows.append([str(i), self.name(i), *shown])
        return "\n".join([*self._title(), "", *_aligned([heads, *rows])])

    def _title(self) -> list[str]:
        low, high = self.rule.range
        ways = f"{low}" if low == high else f"{low} to {high}"
        shots = "various shots"
        if isinstance(self.rule, FixedEpisodes):
            shots = f"{self.rule.shots} shots, {self.rule.queries} queries"
        domains = ", ".join(map(plain, self.domains))
        each = "each of " if len(self.domains) > 1 else ""
        lines = [
            f"{self.tasks} tasks of {each}{domains}: {ways} ways, {shots}, seed {self.seed}",
            f"{self.tune['iterations']} iterations, {self.optimizer}, "
            f"images {'x'.join(map(str, self.preprocess.shape))}",
            f"accuracy of prototypes alone {self.base} %"
            + ("; ± is the 95 % interval of the mean" if self.base.half is not None else ""),
        ]
        if self.failed:
            lines.append(f"{self.failed} runs diverged; a smaller rate may do better")
        return lines


class Scheme(Frozen):
    """The scheme with the largest predicted gain that a search found under a limit.

    `method` trains it; `gain` is the sum of its contributions, `cost` that of the backward pass
    in the papers' convention, whose `memory` is at most `limit` bytes.  `looked`: how many schemes
    were looked at.
    """

    version: Literal[1] = VERSION
    method: SparseUpdate
    limit: int
    optimizer: Optimizer
    gain: float
    cost: BackwardCost
    looked: int
    seed: int
    contributions: Contributions

    @property
    def shares(self) -> dict[int, float]:
        return {int(i): share for i, share in self.method.weights.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.model_dump(mode="json"), "memory": self.cost.memory, "macs": self.cost.macs}

    def save(self, folder: Path) -> None:
        """Write sparse_update.json, which is a method, and search.json, .txt, .svg and .png."""
        method = {"kind": self.method.kind, **self.method.model_dump(exclude_defaults=True)}
        write(folder / "sparse_update.json", (json.dumps(method, indent=1) + "\n").encode())
        save_all(self, folder, "search")

    def picture(self, path: str | Path) -> None:
        """Draw the contributions, with what was chosen of them, as .svg or .png."""
        c, shares = self.contributions, self.shares
        names = list(c.layers)
        rows = []
        for i in range(len(names) - max(c.biases), len(names)):
            marks = {
                share_text(r): Mark(e.mean, e.half, chosen=shares.get(i) == r)
                for r, e in c.weights.get(i, {}).items()
            }
            k = len(names) - i
            curve = None
            if k in c.biases:
                e = c.biases[k]
                curve = Mark(e.mean, e.half, chosen=k == self.method.biases)
            rows.append(Row(f"{i}  {c.name(i)}", marks, curve))
        title = (
            f"chosen under {kib(self.limit)}: predicted gain {100 * self.gain:+.1f} points, "
            f"backward memory {kib(self.cost.memory)}"
        )
        write(Path(path), picture(rows, title, Path(path).suffix))

    def __str__(self) -> str:
        c, cost = self.contributions, self.cost
        chosen = [
            f"  weight of layer {i} ({c.name(i)}): "
            + ("all" if share == 1 else f"{share_text(share)} of the")
            + " input channels"
            for i, share in self.shares.items()
        ]
        return "\n".join([
            str(c),
            "",
            biases_text(self.method.biases),
            *(chosen or ["  no weight"]),
            f"predicted gain {100 * self.gain:+.1f} points over prototypes alone, "
            f"the best of {self.looked:,} schemes",
            f"backward memory {kib(cost.memory)} of {kib(self.limit)}, {self.optimizer}: "
            f"activations {kib(cost.activation)}, {cost.updated:,} parameters "
            f"{kib(cost.weights + cost.optimizer)}; {count(cost.macs)} MACs",
        ])  # fmt: skip


def biases_text(k: int) -> str:
    return f"biases of the last {k} layers" if k > 1 else "biases of the last layer"


def share_text(share: float) -> str:
    """A share of the channels.

    >>> share_text(1.0), share_text(0.125)
    ('1', '1/8')
    """
    return str(Fraction(share).limit_denominator(1000))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Numbers and names to the left, gains to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                *(f"{c:<{w}}" for c, w in zip(row[:2], widths[:2], strict=True)),
                *(f"{c:>{w}}" for c, w in zip(row[2:], widths[2:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]
