"""Layers with channel attention (p-Meta): convolutions and linear layers as they are, that carry
the branches by which a device chooses the channels that an inner step updates.

A layer gets a submodule `attention`, so its weight keeps its name, and a state dict holds all:
``0.weight``, ``0.attention.fw.down.weight``.  Predictions do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import InvalidInput, UsageError
from modicum.ops.attention import SIDES, scores

REDUCTION, LEAST_HIDDEN = 4, 4
MARK = "attention._extra_state"


class Branch(nn.Module):
    """Scores of C channels: softmax(W2 relu(W1 v + b1) + b2), from their mean magnitudes v (C,).

    v is divided by its mean, since gradients shrink while a task is learned.  The form is that of
    dynamic convolution (Chen et al., CVPR 2020, arXiv 1912.03458); p-Meta does not say more.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(LEAST_HIDDEN, channels // REDUCTION)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W1, b1, W2, b2."""
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def forward(self, v: Tensor) -> Tensor:
        return scores(v, *self.tensors)


class ChannelAttention(nn.Module):
    """gamma^fw over the input channels of a layer, from its input x, and gamma^bw over its output
    channels, from the gradient of its output; None for a side that is left out.
    """

    def __init__(self, inputs: int | None, outputs: int | None) -> None:
        super().__init__()
        self.fw = None if inputs is None else Branch(inputs)
        self.bw = None if outputs is None else Branch(outputs)


class Attention(ChannelAttention):
    """That of an attended layer, with the share of the scores that is kept."""

    def __init__(self, inputs: int | None, outputs: int | None, rho: float) -> None:
        super().__init__(inputs, outputs)
        self.rho = rho

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.rho, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.rho = float(state)


@torch.library.custom_op("modicum::attend", mutates_args=())
def attend(x: Tensor, fw: Sequence[Tensor], bw: Sequence[Tensor], rho: float) -> Tensor:
    """x: an operator that tells a captured model which layer has attention, and its branches."""
    return x.clone()


@attend.register_fake
def _(x: Tensor, fw: Sequence[Tensor], bw: Sequence[Tensor], rho: float) -> Tensor:
    return torch.empty_like(x)


def _tell(
    layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
    """Before the layer runs: nothing, unless the model is being captured."""
    attention = layer.attention
    if not torch.compiler.is_compiling() or not isinstance(attention, Attention):
        return None
    branches = (attention.fw, attention.bw)
    fw, bw = ([] if b is None else list(b.tensors) for b in branches)
    x = inputs[0] if inputs else named["input"]
    return (attend(x, fw, bw, attention.rho),), {}


def attach(net: nn.Module, attention: Mapping[str, ChannelAttention], rho: float) -> None:
    """Give layers of a net, by name, copies of these branches; others keep what they have."""
    for name, branches in attention.items():
        layer = net.get_submodule(name)
        inputs, outputs = (b and b.up.out_features for b in (branches.fw, branches.bw))
        made = Attention(inputs, outputs, rho).to(next(branches.parameters()))
        made.load_state_dict({**branches.state_dict(), "_extra_state": torch.tensor(rho)})
        made.rho = rho
        _attach(layer, made)


def detach(net: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Take the attention of these layers, or of all, from a net."""
    names = [
        n for n, m in net.named_modules() if isinstance(getattr(m, "attention", None), Attention)
    ]
    for name in names if layers is None else layers:
        layer = net.get_submodule(name)
        del layer.attention
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _tell:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)


def without_attention(net: nn.Module) -> nn.Module:
    """A copy of a net whose layers have no attention."""
    made = copy.deepcopy(net)
    detach(made)
    return made


def attach_as_in(net: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Give layers of a net, by their names in a state dict, the branches that it has for them.

    Their values are not loaded.  Returns the names.  Raises InvalidInput for branches of a layer
    that the net does not have.
    """
    made: dict[str, Attention] = {}
    modules = dict(net.named_modules())
    for key, rho in state.items():
        layer = key.removesuffix("." + MARK)
        if layer == key:
            continue
        inputs, outputs = (_channels(state, layer, side) for side in SIDES)
        if not isinstance(modules.get(layer), nn.Conv2d | nn.Linear) or (
            inputs is None and outputs is None
        ):
            raise InvalidInput(
                f"the weights have channel attention of {layer!r}, which the net does not have",
                hint="the net that it was learned for",
            )
        _check_sizes(modules[layer], layer, inputs, outputs)
        share = _rho(rho, layer)
        if not hasattr(modules[layer], "attention"):
            like = next(modules[layer].parameters())
            made[layer] = Attention(inputs, outputs, share).to(like)
    for layer, attention in made.items():
        _attach(modules[layer], attention)
    return list(made)


def _channels(state: Mapping[str, Any], layer: str, side: str) -> int | None:
    """Those of a branch in a state dict, if it has one.  Raises InvalidInput for another shape."""
    bias = state.get(f"{layer}.attention.{side}.up.bias")
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise InvalidInput(f"{layer}.attention.{side}.up.bias is no vector of channels")
    return len(bias)


def _check_sizes(layer: nn.Module, name: str, inputs: int | None, outputs: int | None) -> None:
    weight = layer.get_parameter("weight")
    have, want = tuple(weight.shape[1::-1]), (inputs, outputs)
    if any(w is not None and w != h for h, w in zip(have, want, strict=True)):
        raise InvalidInput(
            f"the attention of {name!r} is of another layer",
            why=f"it is of {inputs} input and {outputs} output channels; the layer has {have}",
            hint="the net that it was learned for",
        )


def _rho(value: Any, layer: str) -> float:
    ok = isinstance(value, Tensor) and value.numel() == 1
    if not ok or not 0 < float(value) <= 1:
        raise InvalidInput(f"rho of the attention of {layer!r} is not above 0 and at most 1")
    return float(value)


def _attach(layer: nn.Module, attention: Attention) -> None:
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise UsageError(f"{type(layer).__name__} cannot have channel attention",
                         hint="convolutions and linear layers can")  # fmt: skip
    had = hasattr(layer, "attention")
    layer.attention = attention.requires_grad_(False)
    if not had:
        layer.register_forward_pre_hook(_tell, with_kwargs=True)
