"""Plans that one firmware holds and chooses between, and what they cost together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modicum.cost import flash
from modicum.errors import DoesNotFit, UsageError
from modicum.plan import Plan
from modicum.units import kib


@dataclass(frozen=True)
class Candidates:
    """Plans of one graph, loss and board, one of which is selected at a time.

    They share the arena, which has the size of the largest, and what they have in flash in common.
    Each updates the same in every inner step, without channel attention.  Raises UsageError for
    plans that do not belong together, and DoesNotFit where the flash of the smallest limit does not
    hold them all.
    """

    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        if not self.plans:
            raise UsageError("a candidate set needs at least one plan")
        first = self.plans[0]
        for i, plan in enumerate(self.plans):
            if plan.inner_steps > 1:
                raise UsageError(
                    f"plan {i} ({plan.method.kind}) has step sizes that differ by inner step",
                    why="the members of a candidate set have one step size for each parameter",
                    hint="emit it alone",
                )
            if plan.attends:
                raise UsageError(
                    f"plan {i} ({plan.method.kind}) has channel attention",
                    why="the members of a candidate set update what they name, in one pass",
                    hint="emit it alone",
                )
        for i, plan in enumerate(self.plans[1:], 1):
            for what, differs in (
                ("graph", plan.graph != first.graph),
                ("loss", plan.loss != first.loss),
                ("board", plan.board != first.board),
            ):
                if differs:
                    raise UsageError(
                        f"plan {i} ({plan.method.kind}) is of another {what} than plan 0",
                        why="the members of a candidate set share graph, loss and board",
                    )
        limits = [p.flash for p in self.plans if p.flash is not None]
        if limits and self.flash > min(limits):
            where = first.board.name if first.board else "the limit"
            raise DoesNotFit(
                f"{len(self.plans)} plans need {kib(self.flash)} of flash together, {where} has "
                f"{kib(min(limits))}.",
                why=f"weights {kib(self.flash_weights)}, code about {kib(self.flash_code)}",
                hint="fewer plans, or such that train less: initial values of slices come on top",
            )

    @property
    def worst(self) -> int:
        """The index of the plan that needs most RAM."""
        return max(range(len(self.plans)), key=lambda i: self.plans[i].cost.ram)

    @property
    def ram(self) -> int:
        return self.plans[self.worst].cost.ram

    @cached_property
    def _flash(self) -> tuple[int, int]:
        return flash(*(p.program for p in self.plans))

    @property
    def flash_weights(self) -> int:
        """Frozen weights and initial values of all plans, each once."""
        return self._flash[0]

    @property
    def flash_code(self) -> int:
        return self._flash[1]

    @property
    def flash(self) -> int:
        return self.flash_weights + self.flash_code

    @property
    def hash(self) -> str:
        return hashlib.sha256("".join(p.hash for p in self.plans).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return {
            "plans": [
                {
                    "method": p.method.kind,
                    "hash": p.hash,
                    "ram": p.cost.ram,
                    "trained_params": p.cost.trained_params,
                }
                for p in self.plans
            ],
            "ram": self.ram,
            "worst": self.worst,
            "flash": self.flash,
            "flash_weights": self.flash_weights,
            "flash_code": self.flash_code,
        }

    def __str__(self) -> str:
        alone = sum(p.cost.flash for p in self.plans)
        rows = [
            f"  {i}  {p.method.kind}, {p.optimizer}: RAM {kib(p.cost.ram)}, "
            f"{p.cost.trained_params:,} parameters"
            for i, p in enumerate(self.plans)
        ]
        flash_line = (
            f"  flash {kib(self.flash)} of all (weights {kib(self.flash_weights)}, code about "
            f"{kib(self.flash_code)}; {kib(alone)} each for itself)"
        )
        ram_line = f"  RAM {kib(self.ram)} of plan {self.worst}, which needs most"
        return "\n".join([f"{len(self.plans)} plans", *rows, ram_line, flash_line])
