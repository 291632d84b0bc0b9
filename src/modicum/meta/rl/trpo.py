"""Trust-region policy optimisation: a natural gradient step that a line search makes safe.

Schulman et al., ICML 2015 (arXiv 1502.05477).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd import grad

from modicum.graph import Frozen
from modicum.meta.rl.gaussian import Gaussian

Count = Annotated[int, Field(ge=1)]


class TRPO(Frozen):
    """max_x -L(x) s.t. mean KL(pi || pi_x) <= `kl`: x <- x - s F^-1 g, g = dL/dx.

    F, the Fisher matrix, is never made: `conjugate` steps of conjugate gradients use its products
    with vectors, plus `damping` times the vector.  The first step has the length s that the limit
    allows by the quadratic model of the KL; of `backtracks` steps, each `shrink` times the one
    before, the first is taken that lowers L and keeps the limit.
    """

    kl: Annotated[float, Field(gt=0)] = 0.01
    conjugate: Count = 10
    damping: Annotated[float, Field(ge=0)] = 1e-5
    backtracks: Count = 15
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.8


class Moved(NamedTuple):
    """What an update did: mean KL, change of L, and the share of the first step that was taken."""

    kl: float
    change: float
    share: float


def update(
    parameters: Sequence[Tensor],
    policy: Callable[[], Gaussian],
    loss: Callable[[Gaussian], Tensor],
    config: TRPO,
) -> Moved:
    """Move `parameters` by one step.

    `policy` is what they make of the sampled states, `loss` is L of it.  Nothing is moved, with a
    share of 0, where no step is good enough.
    """
    now = policy()
    old, before = now.snapshot(), loss(now)
    gradient = flat_gradient(before, parameters)
    fisher = fisher_product(now, parameters, config.damping)
    direction = conjugate_gradient(fisher, gradient, config.conjugate)
    curvature = float(direction @ fisher(direction))
    if not curvature > 0:
        return Moved(0.0, 0.0, 0.0)
    whole = (2 * config.kl / curvature) ** 0.5 * direction
    return search(parameters, whole, policy, loss, old, float(before.detach()), config)


@torch.no_grad()
def search(
    parameters: Sequence[Tensor],
    whole: Tensor,
    policy: Callable[[], Gaussian],
    loss: Callable[[Gaussian], Tensor],
    old: Gaussian,
    before: float,
    config: TRPO,
) -> Moved:
    """Go back from x - `whole` until L is less than `before` and the KL is within its limit."""
    start = flat(parameters)
    for k in range(config.backtracks):
        share = config.shrink**k
        put(parameters, start - share * whole)
        new = policy()
        change, kl = float(loss(new)) - before, float(old.kl_to(new).mean())
        if change < 0 and kl <= config.kl:  # neither holds for what is not finite
            return Moved(kl, change, share)
    put(parameters, start)
    return Moved(0.0, 0.0, 0.0)


def fisher_product(
    now: Gaussian, parameters: Sequence[Tensor], damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """v -> (J' M J + damping) v: the Hessian of the mean KL by the parameters, at the old policy.

    J is that of (mean, log_std) by the parameters, M the Fisher matrix of a Gaussian by these: 1 /
    std^2 and 2.  J v is had by differentiating u -> J' u.
    """
    parts = [now.mean, now.log_std.expand_as(now.mean)]
    samples = now.mean[..., 0].numel()
    weights = [(-2 * parts[1]).exp().detach() / samples, 2 / samples]
    dummies = [torch.zeros_like(part, requires_grad=True) for part in parts]
    back = flat_gradient(parts, parameters, dummies, create_graph=True)

    def product(v: Tensor) -> Tensor:
        forward = grad(back, dummies, v, retain_graph=True)
        outs = [w * f for w, f in zip(weights, forward, strict=True)]
        return flat_gradient(parts, parameters, outs) + damping * v

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with product(x) = b, nearly; product is that of a symmetric positive matrix."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = b.clone(), b @ b
    least = 1e-20 * rr
    for _ in range(steps):
        if rr <= least:
            break
        z = product(p)
        alpha = rr / (p @ z)
        x, r = x + alpha * p, r - alpha * z
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return x


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def put(parameters: Sequence[Tensor], values: Tensor) -> None:
    """Give the parameters the values of one vector."""
    parts = values.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))


def flat_gradient(
    outputs: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> Tensor:
    """The gradient as one vector; 0 for a parameter that the outputs do not depend on."""
    found = grad(
        outputs, parameters, weights, retain_graph=True, create_graph=create_graph,
        materialize_grads=True,
    )  # fmt: skip
    return flat(found)
