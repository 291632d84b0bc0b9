"""The inner loop: a net as a function of its parameters, and gradient steps on a support set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from modicum.errors import UsageError
from modicum.meta.norms import norms_of, transformed

Params = dict[str, Tensor]
Rate = Callable[[str, int], Any]
"""The step size of a parameter in an inner step."""
Loss = Callable[[Tensor, Params], Tensor]
"""Of what a net makes of its inputs, and of its parameters."""


def output(net: nn.Module, params: Mapping[str, Tensor], x: Tensor, step: int) -> Tensor:
    """What `net` makes of x (n, ...) with these parameters in the place of its own.

    `step` is the inner step, for norms that have statistics or weights for each.
    """
    for norm in norms_of(net):
        norm.step = step
    return functional_call(net, dict(params), (x,))


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for labels (n,), the mean squared error for targets of floats."""
    if y.is_floating_point():
        return F.mse_loss(outputs, y.reshape(outputs.shape))
    return F.cross_entropy(outputs, y)


def gradient_steps(
    net: nn.Module,
    params: Params,
    moving: set[str],
    support: tuple[Tensor, Tensor],
    steps: int,
    rate: Rate,
    second_order: bool,
) -> Iterator[Params]:
    """Yield the parameters after each of `steps` full-batch steps on a support set."""
    x, y = support
    for k in range(steps):
        params = gradient_step(
            net, params, moving, x, lambda out, _: loss_of(out, y), k, rate, second_order
        )
        yield params


def gradient_step(
    net: nn.Module,
    params: Params,
    moving: set[str],
    x: Tensor,
    loss: Loss,
    step: int,
    rate: Rate,
    second_order: bool,
) -> Params:
    """w <- w - rate(w, step) dL/dw for the parameters in `moving`; the others stay.

    With `second_order` the result is a differentiable function of `params`, through the
    gradients; without, the gradients are constants.
    """
    frozen = {name: w for name, w in params.items() if name not in moving}
    now = {name: w for name, w in params.items() if name in moving}

    def value(part: Params) -> tuple[Tensor, Params]:
        return loss(output(net, {**frozen, **part}, x, step), {**frozen, **part}), {}

    inside = any(map(transformed, (x, *params.values())))
    gradients, _ = differentiate(value, now, second_order, inside)
    return {**frozen, **{name: w - rate(name, step) * gradients[name] for name, w in now.items()}}


def differentiate(
    value: Callable[[Params], tuple[Tensor, Params]], at: Params, second_order: bool, inside: bool
) -> tuple[Params, Params]:
    """The gradient of what `value` returns first, and what it returns beside it; both constants
    unless `second_order`.  `inside`: of a transform such as vmap.
    """
    at = at if second_order else detached(at)
    if inside:
        found, beside = grad(value, has_aux=True)(at)
    else:
        found, beside = _by_autograd(value, at, second_order)
    return (found, beside) if second_order else (detached(found), detached(beside))


def _by_autograd(
    value: Callable[[Params], tuple[Tensor, Params]], at: Params, graph: bool
) -> tuple[Params, Params]:
    """As torch.func.grad, which takes a tenth more time."""
    if not at:
        return {}, value(at)[1]
    graph = graph and torch.is_grad_enabled()
    with torch.enable_grad():
        # each by a name of its own: one that an earlier step left alone may be what others were
        # computed from, and its gradient is not to go through those
        at = {
            n: w.view_as(w) if w.requires_grad else w.detach().requires_grad_()
            for n, w in at.items()
        }
        result, beside = value(at)
        found = torch.autograd.grad(
            result, tuple(at.values()), create_graph=graph, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
    return dict(zip(at, found, strict=True)), beside


def layers_of(net: nn.Module) -> dict[str, list[str]]:
    """Modules that have parameters of their own, in order, with the names of these."""
    found = {}
    for name, module in net.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p is not None]
        if own:
            found[name] = [f"{name}.{n}" if name else n for n in own]
    return found


@contextmanager
def clear_errors(net: nn.Module) -> Iterator[None]:
    """Say what it means where a net cannot be made a function of its parameters."""
    before = _buffers(net)
    try:
        yield
        changed = [name for name, state in _buffers(net).items() if before.get(name) != state]
        if changed:
            raise RuntimeError(f"changed in-place: {', '.join(changed)}")
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        odd = ("in-place", "inplace", "vmap", "functorch", "data-dependent")
        if any(word in text for word in odd):
            kinds = sorted({type(m).__name__ for m in net.modules() if dict(m.named_buffers())})
            raise UsageError(
                "the model cannot be made a function of its parameters",
                why=text.strip().splitlines()[0],
                hint="a module that changes its own buffers in forward() cannot be meta-trained; "
                f"modules with buffers here: {', '.join(kinds) or 'none'}",
            ) from None
        raise


def _buffers(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors the buffers of floats are, and how often they have been written to."""
    return {n: (id(b), b._version) for n, b in net.named_buffers() if b.is_floating_point()}


def detached(params: Mapping[str, Tensor]) -> Params:
    return {name: w.detach() for name, w in params.items()}


def own_params(net: nn.Module) -> Params:
    return dict(net.named_parameters())
