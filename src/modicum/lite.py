"""Lite residual modules: a small trainable branch beside each inverted residual block.

y = F_W(x) + up(L(pool(x)))          TinyTL, Cai et al., NeurIPS 2020 (arXiv 2007.11622)

pool    the mean of 2x2 pixels; the global mean where that leaves a single pixel
L       k x k convolution in groups - group norm - ReLU - 1x1 convolution - group norm
up      bilinear, to the size of F_W(x)

x has few of the channels that a block has inside, and pooling leaves a quarter of its pixels, so
training L keeps little.  The module is called ``lite``, and the block ``main``: the parameters
of ``blocks.3`` become ``blocks.3.main.*`` and ``blocks.3.lite.*``.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.blocks import Block, describe, find_blocks
from modicum.capture import capture
from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.methods import Method, TinyTL
from modicum.methods.tinytl import dropped


def prepare_model(model: nn.Module, example: Tensor, method: Method) -> nn.Module:
    """The model that a method trains: `model` itself, or a copy with the modules that it needs.

    Only `TinyTL` with lite modules needs any: for it this is `add_lite_residuals` with the
    method's fields.  A model that has lite residuals already is returned as it is.  The same
    arguments give the same weights, so every command sees the same network.

    >>> import modicum as mo
    >>> net = nn.Linear(4, 2)
    >>> prepare_model(net, torch.zeros(1, 4), mo.Full()) is net
    True
    """
    if not isinstance(method, TinyTL) or method.mode == "bias":
        return model
    if any(isinstance(m, LiteResidual) for m in model.modules()):
        return model
    return add_lite_residuals(
        model,
        example,
        kernel=method.kernel,
        groups=method.groups,
        norm_channels=method.norm_channels,
        standardise=method.standardise,
        backbone_norm=method.backbone_norm,
        drop=method.drop,
        seed=method.seed,
    )


def add_lite_residuals(
    model: nn.Module,
    example: Tensor,
    *,
    kernel: int = 5,
    groups: int = 2,
    norm_channels: int = 8,
    standardise: bool = True,
    backbone_norm: Literal["keep", "group"] = "keep",
    drop: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """A copy of the model with a lite residual module beside every inverted residual block.

    The blocks are found in the graph captured with `example`, (n, channels, h, w), whatever the
    model calls them; a first block without an expansion is none, and gets no module (nor does it
    in the paper's code).  The last norm's scale and shift start at zero, so the copy's outputs
    are those of the model.  Of a block (c, h, w) -> (out, h', w') of stride s:

    - `kernel`: the convolution is k x k with padding k // 2 and the block's stride, c -> c; k is
      the largest odd number above neither `kernel` nor the pooled map's sides, and 1 after a
      global mean.
    - `groups`: of that convolution; the greatest divisor that they share with c.
    - `norm_channels` are in one group of a norm; where they do not divide its channels, the
      largest smaller number that does.  A norm whose groups would have a single value has one
      group instead.
    - `standardise`: both convolutions have standardised weights, (w - mean) / sqrt(var + 1e-5)
      over each output channel (but for one with a single entry per channel).  The norm behind it
      makes the output the same for any scale of w.
    - `backbone_norm`: "keep" leaves the backbone as it is, so that weights trained with batch
      norms keep their meaning.  "group" replaces each BatchNorm2d by a GroupNorm of the same
      scale, shift and eps, and changes what the model computes: such a backbone has to be trained
      again, or loaded with weights that were trained with group norms.
    - `drop`: the first drop * blocks of the blocks, rounded half up, get no lite module.
    - `seed`: of the initial weights, N(0, 2 / fan out).

    The paper pre-trains backbone and lite modules together on ImageNet, with group norms and
    standardised weights in the whole net.  Here the lite modules start untrained, beside a
    backbone as it is.

    Raises UsageError when there is no such block, or when one that gets a lite module is not a
    module of its own (an nn.Module that computes this block and nothing else, once); all of
    those are named.
    """
    if min(kernel, groups, norm_channels) < 1:
        raise UsageError("kernel, groups and norm_channels are at least 1")
    if backbone_norm not in ("keep", "group"):
        raise UsageError(f"no backbone_norm is called {backbone_norm!r}", hint="keep or group")
    if not 0 <= drop < 1:
        raise UsageError(f"drop is a share from 0 to below 1, not {drop}")
    graph = capture(model, example)
    blocks = _replaceable(model, graph, drop)
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    if backbone_norm == "group":
        _group_norms(result, graph, norm_channels)
    with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        for block in blocks:
            shape = graph.shape(graph.by_name[block.expand].inputs[0])[1:]
            stride = graph.by_name[block.depthwise].attrs["stride"]
            out = graph.shape(block.nodes[-1])[1]
            lite = Lite(shape, out, stride, kernel, groups, norm_channels, standardise)
            lite.reset(generator)
            main = result.get_submodule(block.name)
            weight = next(main.parameters())
            lite.to(weight.device).train(main.training)
            _replace(result, block.name, LiteResidual(main, lite))
    return result


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).add_module(last, module)


class LiteResidual(nn.Module):
    """main(x) + lite(x): a block and the lite residual module beside it."""

    def __init__(self, main: nn.Module, lite: Lite) -> None:
        super().__init__()
        self.main, self.lite = main, lite
        self.training = main.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return y + self.lite(x, y.shape[2:])


class Lite(nn.Module):
    """up(L(pool(x))): (n, c, h, w) -> (n, out, *size), made for a map x of `shape` (c, h, w)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        out: int,
        stride: tuple[int, int],
        kernel: int,
        groups: int,
        norm_channels: int,
        standardise: bool,
    ) -> None:
        super().__init__()
        c, h, w = shape
        window = (min(2, h), min(2, w))
        pooled = (h // window[0], w // window[1])
        self.pool: nn.Module = nn.AvgPool2d(window)
        k = min(kernel, *pooled)
        k -= 1 - k % 2
        if pooled == (1, 1):
            self.pool, stride = nn.AdaptiveAvgPool2d(1), (1, 1)
        pixels = -(-pooled[0] // stride[0]) * -(-pooled[1] // stride[1])
        groups = math.gcd(c, groups)
        many = c // groups * k * k > 1
        conv = StandardisedConv2d if standardise and many else nn.Conv2d
        self.conv = conv(c, c, k, stride, k // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(norm_groups(c, norm_channels, pixels), c)
        self.act = nn.ReLU()
        mix = StandardisedConv2d if standardise and c > 1 else nn.Conv2d
        self.mix = mix(c, out, 1, bias=False)
        self.last_norm = nn.GroupNorm(norm_groups(out, norm_channels, pixels), out)

    def reset(self, generator: torch.Generator) -> None:
        """New weights; the last norm's scale and shift are zero, and so the output."""
        for conv in (self.conv, self.mix):
            fan_out = conv.weight[:, 0].numel() // conv.groups
            nn.init.normal_(conv.weight, 0.0, (2.0 / fan_out) ** 0.5, generator)
        nn.init.zeros_(self.last_norm.weight)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        y = self.act(self.norm(self.conv(self.pool(x))))
        y = self.last_norm(self.mix(y))
        return y if y.shape[2:] == size else F.interpolate(y, size, mode="bilinear")


class StandardisedConv2d(nn.Conv2d):
    """A convolution with the weight (w - mean) / sqrt(var + eps), over each output channel.

    Weight standardisation (Qiao et al., arXiv 1903.10520), var biased; otherwise nn.Conv2d.
    """

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        w = F.layer_norm(self.weight, self.weight.shape[1:], None, None, self.eps)
        return self._conv_forward(x, w, self.bias)


def norm_groups(channels: int, per_group: int, pixels: int) -> int:
    """The number of groups of a norm over `channels`, of at most `per_group` each.

    >>> norm_groups(32, 8, 49), norm_groups(20, 8, 49), norm_groups(6, 8, 1), norm_groups(11, 8, 1)
    (4, 4, 1, 1)
    """
    size = max(n for n in range(1, min(per_group, channels) + 1) if channels % n == 0)
    return channels // size if size * pixels > 1 else 1


def _replaceable(model: nn.Module, graph: Graph, drop: float) -> tuple[Block, ...]:
    """The graph's blocks that are not dropped, each of which is a module."""
    blocks = find_blocks(graph)
    if not blocks:
        raise UsageError(
            "the model has no inverted residual blocks to put lite residual modules beside",
            where=f"found {describe(blocks)}",
            hint='TinyTL(mode="bias") needs none',
        )
    blocks = blocks[dropped(drop, len(blocks)) :]
    names = dict(model.named_modules())
    problems = []
    for block in blocks:
        inside = [n for n in graph.nodes if f"{n.module}.".startswith(f"{block.name}.")]
        others = [n.name for n in inside if n.name not in block.nodes]
        weight = graph.by_name[block.expand].params["weight"]
        if block.name not in names:
            problems.append(f"{block.name}: not a module of its own")
        elif len(graph.users_of(weight)) > 1:
            problems.append(f"{block.name}: its module is called more than once")
        elif others:
            problems.append(f"{block.name}: its module also computes {', '.join(others[:4])}")
    if problems:
        raise UsageError(
            f"{len(problems)} of {len(blocks)} blocks cannot be replaced by a module with a lite "
            "residual",
            where=problems,
            hint="make an nn.Module of each block, from its expansion to its projection",
        )
    return blocks


def _group_norms(model: nn.Module, graph: Graph, norm_channels: int) -> None:
    """Replace each BatchNorm2d of the model of `graph`."""
    pixels = {
        node.params.get("mean"): math.prod(graph.shape(node.name)[2:])
        for node in graph.nodes
        if node.op == "batch_norm"
    }
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            there = pixels.get(f"{name}.running_mean", 1)
            groups = norm_groups(norm.num_features, norm_channels, there)
            new = nn.GroupNorm(groups, norm.num_features, norm.eps, norm.affine)
            if norm.affine:
                new.weight, new.bias = norm.weight, norm.bias
            _replace(model, name, new.train(norm.training))
