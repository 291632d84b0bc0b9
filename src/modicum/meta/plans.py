"""What a rule has learned, as a method that a Plan can be made with."""

from __future__ import annotations

import torch

from modicum.errors import UsageError
from modicum.meta.learner import GradientLearner, Learner
from modicum.meta.pmeta import PMetaLearner
from modicum.methods import Explicit


def method_of(learner: Learner, steps: int | None = None) -> Explicit:
    """The inner rule of a learner: the parameters that it moves, with a step size per inner step.

    For a plan with ``SGD(lr=1.0)`` and, where samples pass one by one, ``accumulate`` as large as a
    support set, whose gradients are averaged.  `steps`: as many inner steps, those of a task that
    is judged by default.  Norms that use the statistics of the batch are named; per-step scales and
    shifts are those of the first step.  p-Meta's channel attention is part of the net that
    `write_to` gave it to, which the method is for.  Raises UsageError for a rule without gradient
    steps.
    """
    if not isinstance(learner, GradientLearner):
        raise UsageError("the rule takes no gradient steps", hint="plan --ways, with a method")
    count = learner.judged if steps is None else steps
    if count < 1:
        raise UsageError("a plan of no inner step updates nothing", hint="steps from 1 on")
    with torch.no_grad():
        rates = {
            name: tuple(float(learner.step_size(name, k)) for k in range(count))
            for name in sorted(learner.moved)
        }
    for k in range(count):
        if not any(r[k] for r in rates.values()):
            raise UsageError(f"inner step {k} of what was learned updates nothing")
    norms = ("*",) if learner.norms != "frozen" and learner.has_norms else ()
    return Explicit(
        params={name: {"rates": _short(r)} for name, r in rates.items() if any(r)},
        batch_norms=norms,
        attended=_attended(learner, rates),
    )


def _attended(learner: Learner, rates: dict[str, tuple[float, ...]]) -> tuple[str, ...]:
    """The weights of which attention chooses the channels, where some step updates them."""
    if not isinstance(learner, PMetaLearner):
        return ()
    weights = (f"{layer}.weight" for layer in learner.attended)
    return tuple(name for name in weights if any(rates.get(name, ())))


def _short(rates: tuple[float, ...]) -> tuple[float, ...]:
    """Without repetitions at the end: the last one is repeated anyway."""
    n = len(rates)
    while n > 1 and rates[n - 1] == rates[n - 2]:
        n -= 1
    return rates[:n]
