"""Rules of meta-learning side by side: accuracy, memory and MACs of an adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from modicum.graph import Frozen
from modicum.report.comparison import write
from modicum.units import count, duration, size


class AdaptationCost(Frozen):
    """Of all inner steps on the support set of a task, which has `samples`; bytes.

    All samples at once.  backward: what the backward pass of a step holds at most, kept values and
    gradients; forward: what a forward pass does, and a prediction for as many samples; both by
    plan, and measured in PyTorch.  macs: of all steps, by plan, and those of the convolutions and
    matrix products that PyTorch was seen to carry out.

    Frozen layers take one sample at a time (see `modicum.stream`).  streamed: what a forward pass
    holds then, by plan and measured; streamed_macs: of all steps, with those that are computed
    twice.  The backward pass is the same.

    All layers take one sample at a time, as on a board.  board: the most bytes of a step, forward
    or backward, with the gradients that are summed over the samples; nothing is measured in
    PyTorch.  board_macs: of all steps, in which samples pass twice where attention chooses.

    layers: updated in each step.
    """

    samples: int
    layers: tuple[int, ...] = ()
    backward: int = 0
    forward: int = 0
    measured_backward: int = 0
    measured_forward: int = 0
    macs: int = 0
    measured_macs: int = 0
    streamed: int = 0
    measured_streamed: int = 0
    streamed_macs: int = 0
    measured_streamed_macs: int = 0
    board: int = 0
    board_macs: int = 0

    @property
    def peak(self) -> int:
        """The most bytes of a step, by plan, where frozen layers take one sample at a time."""
        return max(self.streamed, self.backward)

    @property
    def measured_peak(self) -> int:
        return max(self.measured_streamed, self.measured_backward)


class RuleRow(Frozen):
    """One rule: its score on test tasks, with half of the 95 % interval, and what adapting costs.

    The score is an accuracy, or a mean squared error.
    """

    label: str
    score: float
    interval: float
    labels: bool
    seconds: float
    cost: AdaptationCost


class RuleComparison(Frozen):
    """Rules that were meta-trained alike and judged on the same `tasks`.

    `left_out` maps those that do not apply to the reason.
    """

    version: Literal[1] = 1
    tasks: int
    rows: tuple[RuleRow, ...]
    left_out: dict[str, str] = {}

    def save(self, folder: Path) -> None:
        write(folder / "rules.json", (self.model_dump_json(indent=1) + "\n").encode())
        write(folder / "rules.txt", f"{self}\n".encode())

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        first = self.rows[0]
        score = "accuracy" if first.labels else "error"
        head = ("", score, "layers by step", "backward", "measured", "forward", "measured",
                "streamed", "measured", "board", "MACs", "on a board", "training")  # fmt: skip
        table = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(r[i]) for r in table) for i in range(len(head))]
        lines = [
            f"{self.tasks} test tasks; adapting to one with {first.cost.samples} support samples",
            "",
        ]
        for r in table:
            right = [f"{c:>{w}}" for c, w in zip(r[1:], widths[1:], strict=True)]
            lines.append("  ".join([f"{r[0]:<{widths[0]}}", *right]).rstrip())
        lines += [
            "",
            "backward: most bytes held in the backward pass of an inner step, by plan and in "
            "PyTorch; forward:",
            "in a forward pass, which predicting takes too; streamed: in one whose frozen layers "
            "take a sample",
            "at a time; board: in a step that takes a sample at a time, summed gradients included; "
            "MACs: of all",
            "inner steps, and on a board, where samples pass twice if attention chooses channels; "
            "±: 95 %",
            "interval over tasks",
        ]
        lines += [f"left out: {k}: {v}" for k, v in self.left_out.items()]
        return "\n".join(lines)


def _cells(row: RuleRow) -> tuple[str, ...]:
    c = row.cost
    shown = f"{row.score:.4f} ± {row.interval:.4f}"
    if row.labels:
        shown = f"{100 * row.score:.2f} ± {100 * row.interval:.2f} %"
    layers = " ".join(map(str, c.layers)) if len(c.layers) < 9 else f"{c.layers[0]} ..."
    return (
        row.label, shown, layers or "-", size(c.backward) if c.layers else "-",
        size(c.measured_backward) if c.layers else "-", size(c.forward),
        size(c.measured_forward) if c.layers else "-", size(c.streamed),
        size(c.measured_streamed) if c.layers else "-", size(c.board),
        count(c.macs), count(c.board_macs), duration(row.seconds),
    )  # fmt: skip
