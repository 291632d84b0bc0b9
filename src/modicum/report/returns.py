"""Returns of a policy that was meta-trained: before and after it adapts, as data, text, picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from modicum.errors import InvalidInput
from modicum.graph import Frozen
from modicum.report.comparison import interval, save_all, write
from modicum.report.pictures.returns import Step, picture
from modicum.units import count, duration, kib

VERSION: Literal[1] = 1
NAME = "returns"


class Mean(Frozen):
    """A mean return over tasks, and half of its 95 % interval (Student's t); None for one task."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


class Iteration(Frozen):
    """Mean returns before and after each inner step, and what the update did to the adapted policy.

    kl: mean KL divergence; change: of the loss that it lowers; share: of the first step that its
    line search tried (0: nothing moved).  seconds: since the beginning of the training.
    """

    returns: tuple[float, ...]
    kl: float
    change: float
    share: float
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"return {_arrow(self.returns)}, KL {self.kl:.4f}"


class StepCost(Frozen):
    """An inner step on all episodes of a task: the layers that it updates, the most bytes that its
    backward pass holds, MACs of its forward and backward pass.
    """

    layers: tuple[str, ...]
    memory: int
    forward: int
    backward: int

    @property
    def macs(self) -> int:
        return self.forward + self.backward

    def __str__(self) -> str:
        what = ", ".join(self.layers) or "nothing"
        return f"updates {what}: {kib(self.memory)} of dynamic memory, {count(self.macs)} MACs"


class Returns(Frozen):
    """How a meta-training of a policy went, and what came of it.

    test: after 0, 1, .. inner steps, the mean return in each task of some that it was not trained
    on.  costs: of each inner step; whole: of one that updates all layers, and all of their weights.
    """

    version: Literal[1] = VERSION
    environment: str
    rule: str
    horizon: int
    episodes: int
    seed: int
    log: tuple[Iteration, ...]
    test: tuple[tuple[float, ...], ...]
    costs: tuple[StepCost, ...]
    whole: StepCost

    @property
    def means(self) -> tuple[Mean, ...]:
        """Of the returns after each number of inner steps."""
        return tuple(mean(values) for values in self.test)

    @property
    def gains(self) -> tuple[Mean, ...]:
        """Of the returns after 1, 2, .. inner steps less those before, task by task."""
        before, *after = self.test or ((),)
        return tuple(mean([a - b for a, b in zip(x, before, strict=True)]) for x in after)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        shown = {k: [m.model_dump() for m in getattr(self, k)] for k in ("means", "gains")}
        return {**self.model_dump(mode="json"), **shown}

    @classmethod
    def load(cls, path: str | Path) -> Returns:
        """What `save` wrote to returns.json."""
        try:
            data = json.loads(Path(path).read_text())
            return cls.model_validate({k: v for k, v in data.items() if k in cls.model_fields})
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} has no returns", why=str(error).splitlines()[0]) from None

    def save(self, folder: Path) -> None:
        """Write returns.json, .txt, .svg and .png."""
        save_all(self, folder, NAME)

    def __str__(self) -> str:
        last = self.log[-1]
        lines = [
            f"{self.environment}, {self.rule}: {len(self.log)} iterations in "
            f"{duration(last.seconds)}, return {_arrow(last.returns)} in the last"
        ]
        if self.test:
            each = f"{self.episodes} episodes of {self.horizon} steps before each inner step"
            lines.append(f"{len(self.test[0])} other tasks, {each}:")
            lines.append(f"  before adaptation  {self.means[0]}")
            for k, (after, gain) in enumerate(zip(self.means[1:], self.gains, strict=True), 1):
                lines.append(f"  after step {k}       {after}, gain {gain}")
        lines += [f"step {k}  {cost}" for k, cost in enumerate(self.costs, 1)]
        return "\n".join([*lines, f"a step that {self.whole}"])

    def picture(self, path: str | Path) -> None:
        """Draw the returns of each iteration, and those of each inner step, as .svg or .png."""
        title = f"{self.environment}, {self.rule}: return of an episode of {self.horizon} steps"
        steps = [Step(m.mean, m.half) for m in self.means]
        curves = [entry.returns for entry in self.log]
        tasks = len(self.test[0]) if self.test else 0
        write(Path(path), picture(curves, steps, tasks, title, Path(path).suffix))


def mean(values: Sequence[float]) -> Mean:
    """Mean and 95 % interval of independent values."""
    return Mean(mean=statistics.fmean(values), half=interval(values))


def _arrow(values: Sequence[float]) -> str:
    return " -> ".join(f"{v:.1f}" for v in values)
