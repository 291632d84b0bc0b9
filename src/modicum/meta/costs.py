"""What it costs to adapt to one task: by plan, and measured in PyTorch."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modicum.apply import apply
from modicum.attended import attach
from modicum.capture import capture
from modicum.live import LiveBytes
from modicum.lower import Loss, Program
from modicum.meta.inner import loss_of
from modicum.meta.learner import GradientLearner, Learner
from modicum.meta.memory import StepMemory, dynamic_bytes
from modicum.meta.plans import method_of
from modicum.meta.pmeta import PMetaLearner
from modicum.optim import SGD
from modicum.plan import Plan, plan
from modicum.report.rules import AdaptationCost
from modicum.stream import dynamic_by_step, streaming


def adaptation_cost(
    net: nn.Module, learner: Learner, support: tuple[torch.Tensor, torch.Tensor]
) -> AdaptationCost:
    """All inner steps of a judged task on a support set (n, ...), (n,).

    `net` is the plain one that the learner was made of.  For p-Meta with attention the plan counts
    the most channels that attention can leave, and what is measured has those that it chose.
    """
    x, y = support
    sample, n = tuple(x.shape[1:]), len(x)
    if not isinstance(learner, GradientLearner) or not learner.judged:
        return _of_predicting(StepMemory(net, sample, n), n)
    loss: Loss = "mse" if y.is_floating_point() else "cross_entropy"
    if isinstance(learner, PMetaLearner):
        net = copy.deepcopy(net)
        attach(net, learner.attended, learner.rule.rho)
    graph = capture(net.eval(), torch.zeros(1, *sample))
    made, summed = (
        plan(graph, None, method_of(learner), SGD(lr=1.0), loss=loss, accumulate=k) for k in (1, n)
    )
    patterns = [made.pattern_of(k) for k in range(learner.judged)]
    programs = [made.programs[i] for i in patterns]
    peaks = [dynamic_bytes(p, n) for p in programs]
    streams = [streaming(p, n) for p in programs]
    macs = n * sum(map(_macs, programs))
    looks = [made.looks[i] for i in patterns]
    whole, streamed = (_measured(net, made, learner.judged, x, y, chunk) for chunk in (None, 1))
    return AdaptationCost(
        samples=n,
        layers=tuple(
            len({u.param.rpartition(".")[0] for u in p.updated if not u.statistic})
            for p in programs
        ),
        backward=max(backward for _, backward in peaks),
        forward=max(forward for forward, _ in peaks),
        measured_backward=whole[1],
        measured_forward=whole[0],
        macs=macs,
        streamed=max(max(s.peak, s.forward) for s in streams),
        measured_streamed=streamed[0],
        streamed_macs=macs + n * sum(s.again for s in streams),
        measured_macs=whole[2],
        measured_streamed_macs=streamed[2],
        board=max(_on_board(p) for p in (*summed.programs, *summed.looks) if p is not None),
        board_macs=macs + n * sum(_macs(look) for look in looks if look is not None),
    )


def _of_predicting(memory: StepMemory, n: int) -> AdaptationCost:
    """The support set passes once, and no gradient is taken."""
    program = memory.program(frozenset())
    forward, macs = memory.forward_peak(frozenset()), memory.macs(frozenset())[0]
    return AdaptationCost(
        samples=n,
        forward=forward,
        macs=macs,
        streamed=streaming(program, n).peak,
        streamed_macs=macs,
        board=_on_board(program),
        board_macs=macs,
    )


def _macs(program: Program) -> int:
    return sum(m.forward + m.dx + m.dw for m in program.macs.values())


def _on_board(program: Program) -> int:
    """The most bytes that one sample holds in a step, and the gradients summed so far."""
    summed = (b.bytes for b in program.buffers.values() if b.kind == "accumulator")
    return max(dynamic_by_step(program, 1)) + sum(summed)


def _measured(
    net: nn.Module, made: Plan, steps: int, x: torch.Tensor, y: torch.Tensor, chunk: int | None
) -> tuple[int, int, int]:
    """The most bytes that PyTorch holds in the (forward, backward) pass of an inner step, and the
    MACs of the convolutions and matrix products that it carries out in all of them.

    `chunk`: samples that frozen layers take at a time.
    """
    tuned = apply(net, made).train()
    tuned.chunk = chunk
    most = [0, 0]
    formulas = {torch.ops.aten.convolution_backward: _backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
        for tuned.inner_step in range(steps):
            with LiveBytes() as live:
                loss = loss_of(tuned(x), y)
                most[0] = max(most[0], live.peak)
                live.restart()
                loss.backward()
                most[1] = max(most[1], live.peak)
            tuned.zero_grad(set_to_none=True)
    return most[0], most[1], int(flops.get_total_flops()) // 2


def _backward_flops(
    dy: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], *more: Any, **_: Any
) -> int:
    """Of the gradients of a convolution that were asked for, for input and weight.

    PyTorch 2.13's own formula takes a grouped weight's gradient for that of a dense one.
    """
    wanted = more[-1]  # bias, stride, padding, dilation, transposed, output padding, groups, mask
    return 2 * math.prod(dy) * math.prod(weight[1:]) * (wanted[0] + wanted[1])
