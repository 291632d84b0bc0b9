"""What it costs to adapt to one task: by plan, and measured in PyTorch."""

from __future__ import annotations

import copy

import torch
from torch import nn

from modicum.apply import apply
from modicum.attended import attach
from modicum.capture import capture
from modicum.live import LiveBytes
from modicum.lower import Loss
from modicum.meta.inner import loss_of
from modicum.meta.learner import GradientLearner, Learner
from modicum.meta.memory import StepMemory, dynamic_bytes
from modicum.meta.plans import method_of
from modicum.meta.pmeta import PMetaLearner
from modicum.optim import SGD
from modicum.plan import Plan, plan
from modicum.report.rules import AdaptationCost


def adaptation_cost(
    net: nn.Module, learner: Learner, support: tuple[torch.Tensor, torch.Tensor]
) -> AdaptationCost:
    """All inner steps of a judged task on a support set (n, ...), (n,), which passes at once.

    `net` is the plain one that the learner was made of.  For p-Meta with attention the plan counts
    the most channels that attention can leave, and what is measured has those that it chose.
    """
    x, y = support
    sample, n = tuple(x.shape[1:]), len(x)
    if not isinstance(learner, GradientLearner) or not learner.judged:
        memory = StepMemory(net, sample, n)
        forward = memory.forward_peak(frozenset())
        return AdaptationCost(samples=n, forward=forward, macs=memory.macs(frozenset())[0])
    loss: Loss = "mse" if y.is_floating_point() else "cross_entropy"
    if isinstance(learner, PMetaLearner):
        net = copy.deepcopy(net)
        attach(net, learner.attended, learner.rule.rho)
    graph = capture(net.eval(), torch.zeros(1, *sample))
    made = plan(graph, None, method_of(learner), SGD(lr=1.0), loss=loss)
    programs = [made.programs[made.pattern_of(k)] for k in range(learner.judged)]
    peaks = [dynamic_bytes(p, n) for p in programs]
    macs = [n * sum(m.forward + m.dx + m.dw for m in p.macs.values()) for p in programs]
    measured = _measured(net, made, learner.judged, x, y)
    return AdaptationCost(
        samples=n,
        layers=tuple(
            len({u.param.rpartition(".")[0] for u in p.updated if not u.statistic})
            for p in programs
        ),
        backward=max(backward for _, backward in peaks),
        forward=max(forward for forward, _ in peaks),
        measured_backward=measured[1],
        measured_forward=measured[0],
        macs=sum(macs),
    )


def _measured(
    net: nn.Module, made: Plan, steps: int, x: torch.Tensor, y: torch.Tensor
) -> tuple[int, int]:
    """The most bytes that PyTorch holds in the (forward, backward) pass of an inner step."""
    tuned = apply(net, made).train()
    most = [0, 0]
    for tuned.inner_step in range(steps):
        with LiveBytes() as live:
            loss = loss_of(tuned(x), y)
            most[0] = max(most[0], live.peak)
            live.restart()
            loss.backward()
            most[1] = max(most[1], live.peak)
        tuned.zero_grad(set_to_none=True)
    return most[0], most[1]
