"""What autograd computes for a plan, without `apply`: the check vectors' source.

The prepared graph runs under PyTorch's own autograd, whole parameters and all; only the trained
slices move.  The derivatives that are not autograd's are those of sign masks and probes.  Channel
attention masks the whole gradients of an update.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.capture import state_of
from modicum.graph import Node
from modicum.ops import OPS
from modicum.ops.attention import SIDES, gated, gates, magnitudes
from modicum.optim import Adam
from modicum.plan import Plan
from modicum.state import cut, materialise
from modicum.trace import Trace


def trace(model: nn.Module, plan: Plan, x: Any, y: Any) -> tuple[Trace, list[Any]]:
    """Train on the samples in order; also the outputs before each step.

    Prototypes are the sums of the samples' features, by label (0 where there are targets).
    """
    program = plan.program
    values = materialise(program.graph, state_of(model))
    params = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    slices = {t.param: t.slice for t in program.trained}
    for name in slices:
        params[name].requires_grad_()
    optimizer = _optimizer(plan, params)
    masks = {name: _mask(params[name], s) for name, s in slices.items()}
    if program.refresh is not None:
        _refresh(plan, params, x, [0] * len(x) if plan.loss == "mse" else y)
    result = Trace(where="torch", plan_hash=plan.hash, order=list(range(len(x))))
    seen: list[Any] = []
    recorded: dict[str, list[Any]] = {t.param: [] for t in program.learned}
    masking = _Attention(plan)
    for i in range(len(x)):
        sample = torch.from_numpy(np.asarray(x[i : i + 1]))
        with torch.no_grad():
            seen.append(_forward(plan, params, sample, training=False).numpy()[0].copy())
        values = _values(plan, params, sample, training=True)
        masking.watch(values, step=i // plan.accumulate)
        out = values[program.graph.output]
        if plan.loss == "mse":
            target = torch.from_numpy(np.asarray(y[i : i + 1])).reshape(out.shape)
            loss = ((out - target) ** 2).mean()
        else:
            loss = nn.functional.cross_entropy(out, torch.tensor([int(y[i])]))
        (loss / plan.accumulate).backward()
        masking.see(values)
        result.losses.append(float(loss.detach()))
        if (i + 1) % plan.accumulate == 0:
            masking.mask(params)
            _set_rates(plan, optimizer, params, step=i // plan.accumulate)
            before = {name: params[name].detach().clone() for name in slices}
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name in slices:  # what is not in the slice stays as it was
                    params[name].copy_(torch.where(masks[name], params[name], before[name]))
        for t in program.learned:
            recorded[t.param].append(cut(params[t.param].detach().numpy(), t.slice).copy())
    result.tensors = {name: np.stack(values) for name, values in recorded.items()}
    return result, seen


def _refresh(plan: Plan, params: dict[str, Tensor], x: Any, labels: Any) -> None:
    head = plan.program.graph.by_name[plan.program.graph.output]
    prototypes = params[head.params["prototypes"]].zero_()
    for i, label in enumerate(labels):
        sample = torch.from_numpy(np.asarray(x[i : i + 1]))
        with torch.no_grad():
            features = _values(plan, params, sample, training=False)[head.inputs[0]]
        prototypes[int(label)] += features[0]


def _forward(plan: Plan, params: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    return _values(plan, params, x, training)[plan.program.graph.output]


def _values(plan: Plan, params: dict[str, Tensor], x: Tensor, training: bool) -> dict[str, Tensor]:
    graph = plan.program.graph
    values = {graph.input: x}
    for node in graph.nodes:
        inputs = [values[v] for v in node.inputs]
        p = {role: params[name] for role, name in node.params.items()}
        values[node.name] = _run(node, inputs, p, training)
    return values


class _Attention:
    """Masks the gradients of an update by the magnitudes that passed in its samples."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.nodes: list[Node] = []  # of this step
        self.sums: dict[tuple[str, str], Tensor] = {}

    def watch(self, values: dict[str, Tensor], step: int) -> None:
        program = self.plan.programs[self.plan.pattern_of(step)]
        self.nodes = [n for n in program.graph.nodes if gated(n, program.wanted[n.name])]
        for node in self.nodes:
            values[node.name].retain_grad()

    def see(self, values: dict[str, Tensor]) -> None:
        for node in self.nodes:
            dy = values[node.name].grad
            assert dy is not None
            for side, seen in (("fw", values[node.inputs[0]].detach()), ("bw", dy)):
                key = (node.name, side)
                self.sums[key] = self.sums.get(key, torch.zeros(())) + magnitudes(seen)

    def mask(self, params: dict[str, Tensor]) -> None:
        for node in self.nodes:
            p = {role: params[name] for role, name in node.params.items()}
            fw, bw = (
                gates(node, p, side, self.sums[node.name, side] / self.plan.accumulate)
                for side in SIDES
            )
            for role in ("weight", "bias"):
                gradient = p[role].grad if role in p else None
                if gradient is not None and bw is not None:
                    gradient *= bw.reshape(-1, *[1] * (gradient.dim() - 1))
                if gradient is not None and fw is not None and role == "weight":
                    gradient *= fw.reshape(1, -1, *[1] * (gradient.dim() - 2))
        self.sums = {}


class _Probe(torch.autograd.Function):
    """The identity; the gradient of `score` is the Fisher information of each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        channel = 1 if x.dim() == 4 else x.dim() - 1
        rest = [d for d in range(1, x.dim()) if d != channel]
        inner = (x * g).sum(rest) if rest else x * g
        return g, inner.square().sum(0) / 2


def _run(node: Node, inputs: list[Tensor], p: dict[str, Tensor], training: bool) -> Tensor:
    if node.op == "probe":
        return _Probe.apply(inputs[0], p["fisher"])
    if node.op == "batch_stat_norm" and training:
        norm = (p["mean"], p["var"], p["weight"], p["bias"], True)
        return nn.functional.batch_norm(
            inputs[0], *norm, momentum=node.attrs["momentum"], eps=node.attrs["eps"]
        )
    if not node.attrs.get("sign"):
        return OPS[node.op].forward(node, inputs, p)
    exact = OPS[node.op].forward(node, [inputs[0].detach()], p)
    # the value of the activation, the gradient of x * 1[x >= 0]
    through = inputs[0] * (inputs[0] >= 0)
    return exact + (through - through.detach())


def _mask(p: Tensor, s: Any) -> Tensor:
    mask = np.zeros(tuple(p.shape), dtype=bool)
    rows = np.arange(p.shape[0]) if s.out is None else np.asarray(s.out)
    if s.inp is None:
        mask[rows] = True
    else:
        mask[rows[:, None], np.asarray(s.inp)[None, :]] = True
    return torch.from_numpy(mask)


def _optimizer(plan: Plan, params: dict[str, Tensor]) -> torch.optim.Optimizer:
    o = plan.optimizer
    groups = [{"params": [params[t.param]]} for t in plan.program.trained]
    if isinstance(o, Adam):
        return torch.optim.Adam(groups, o.lr, o.betas, o.eps, weight_decay=o.weight_decay)
    return torch.optim.SGD(groups, o.lr, momentum=o.momentum, weight_decay=o.weight_decay)


def _set_rates(
    plan: Plan, optimizer: torch.optim.Optimizer, params: dict[str, Tensor], step: int
) -> None:
    """The learning rates of an inner step; a slice whose rate is 0 has no gradient."""
    for group, t in zip(optimizer.param_groups, plan.program.trained, strict=True):
        group["lr"] = plan.optimizer.lr * t.rate(step)
        if not t.rate(step):
            params[t.param].grad = None
