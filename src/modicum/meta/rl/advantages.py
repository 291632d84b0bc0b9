"""How much better than expected an action was: a linear baseline of returns, and GAE."""

from __future__ import annotations

import torch
from torch import Tensor

CLIP, TIME = 10.0, 0.01
"""Observations count up to +-10, time in hundreds of steps."""
RIDGE = 1e-5


def discounted(x: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1} along the last dimension."""
    out, last = torch.empty_like(x), torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        last = x[..., t] + factor * last
        out[..., t] = last
    return out


def features(observations: Tensor) -> Tensor:
    """[o, o^2, t, t^2, t^3, 1] of observations (..., h, o): (..., h, 2 o + 4), in doubles.

    Duan et al., ICML 2016 (arXiv 1604.06778).
    """
    o = observations.double().clamp(-CLIP, CLIP)
    t = (TIME * torch.arange(o.shape[-2], dtype=o.dtype, device=o.device))[:, None]
    times = torch.cat([t, t**2, t**3, torch.ones_like(t)], 1)
    return torch.cat([o, o**2, times.expand(*o.shape[:-1], 4)], -1)


def fitted(x: Tensor, targets: Tensor) -> Tensor:
    """x w for the w with least |x w - targets|^2 + RIDGE |w|^2: (..., n, f), (..., n) -> (..., n).

    Every leading index has a fit of its own.
    """
    ridge = RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    right = x.mT @ targets.to(x.dtype)[..., None]
    return (x @ torch.linalg.solve(x.mT @ x + ridge, right))[..., 0]


def gae(rewards: Tensor, values: Tensor, discount: float, decay: float) -> Tensor:
    """A_t = sum_l (discount decay)^l (r_{t+l} + discount V_{t+l+1} - V_{t+l}), V = 0 at the end.

    Of rewards and values (..., h).  Schulman et al., ICLR 2016 (arXiv 1506.02438).
    """
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted(rewards + discount * after - values, discount * decay)


def advantages(observations: Tensor, rewards: Tensor, discount: float, decay: float) -> Tensor:
    """Of the episodes of tasks (t, e, h, o), (t, e, h): (t, e, h), each task's of mean 0, std 1.

    Each task has a baseline of its own, fitted to the returns of the same episodes.
    """
    returns = discounted(rewards.double(), discount)
    values = fitted(features(observations).flatten(1, 2), returns.flatten(1)).view_as(returns)
    made = gae(rewards.double(), values, discount, decay)
    mean, std = made.mean((1, 2), keepdim=True), made.std((1, 2), keepdim=True)
    return ((made - mean) / (std + 1e-8)).to(rewards.dtype)
