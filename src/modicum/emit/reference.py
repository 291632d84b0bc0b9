"""What PyTorch's own autograd computes for a plan, without `apply`: the check vectors' source.

The gradients come from the captured model under plain autograd; only the trained slices move.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from modicum.optim import Adam
from modicum.plan import Plan
from modicum.state import cut
from modicum.trace import Trace


def trace(model: nn.Module, plan: Plan, x: Any, y: Any) -> tuple[Trace, list[Any]]:
    """Train a copy of `model` on the samples in order; also the outputs before each step."""
    import copy

    net = copy.deepcopy(model).float().cpu().eval()
    params = dict(net.named_parameters())
    slices = {t.param: t.slice for t in plan.program.trained}
    for name, p in params.items():
        p.requires_grad_(name in slices)
    optimizer = _optimizer(plan, params)
    masks = {name: _mask(params[name], s) for name, s in slices.items()}
    result = Trace(where="torch", plan_hash=plan.hash, order=list(range(len(x))))
    seen: list[Any] = []
    recorded: dict[str, list[Any]] = {name: [] for name in slices}
    for i in range(len(x)):
        out = net(torch.from_numpy(np.asarray(x[i : i + 1])))
        seen.append(out.detach().numpy()[0].copy())
        if plan.loss == "mse":
            target = torch.from_numpy(np.asarray(y[i : i + 1])).reshape(out.shape)
            loss = ((out - target) ** 2).mean()
        else:
            loss = nn.functional.cross_entropy(out, torch.tensor([int(y[i])]))
        (loss / plan.accumulate).backward()
        result.losses.append(float(loss.detach()))
        if (i + 1) % plan.accumulate == 0:
            before = {name: params[name].detach().clone() for name in slices}
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name in slices:  # what is not in the slice stays as it was
                    params[name].copy_(torch.where(masks[name], params[name], before[name]))
        for name, s in slices.items():
            recorded[name].append(cut(params[name].detach().numpy(), s).copy())
    result.tensors = {name: np.stack(values) for name, values in recorded.items()}
    return result, seen


def _mask(p: nn.Parameter, s: Any) -> torch.Tensor:
    mask = np.zeros(tuple(p.shape), dtype=bool)
    rows = np.arange(p.shape[0]) if s.out is None else np.asarray(s.out)
    if s.inp is None:
        mask[rows] = True
    else:
        mask[rows[:, None], np.asarray(s.inp)[None, :]] = True
    return torch.from_numpy(mask)


def _optimizer(plan: Plan, params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    o = plan.optimizer
    rates = {u.param: u.rates[0] for u in plan.selection}
    groups = [{"params": [params[n]], "lr": o.lr * r} for n, r in rates.items()]
    if isinstance(o, Adam):
        return torch.optim.Adam(groups, o.lr, o.betas, o.eps, weight_decay=o.weight_decay)
    return torch.optim.SGD(groups, o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
