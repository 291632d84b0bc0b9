"""The inverted residual block, and the network that the mobile nets are: stem, blocks, classifier.

    block   y = project(se(depthwise(expand(x)))),  + x where the stride is 1 and the widths agree
    net     stem, blocks, mix (a 1x1 convolution), global mean, hidden (a layer), classifier

expand, se, mix and hidden are left out where the published net has none.  Papers: MobileNetV2
(arXiv 1801.04381), squeeze-and-excitation in it: MobileNetV3 (arXiv 1905.02244).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Style:
    """How every convolution of a net is normalised and padded.

    `eps` and `momentum` are those of the batch norms.  `same` pads as TensorFlow does: a strided
    convolution gets, where the padding is odd, the larger half below and to the right.

    `folded` means no norms: each convolution has a bias instead.  It is what remains of a batch
    norm with frozen statistics, weight * gamma / sigma and beta - gamma * mean / sigma, so that
    "train only the shifts of the norms" means "train the biases" in such a net.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    same: bool = False
    folded: bool = False


PLAIN = Style()
FOLDED = Style(folded=True)


@dataclass(frozen=True)
class Row:
    """One block of a net's table: kernel, width inside, width out; `squeeze` is the SE's width."""

    kernel: int
    hidden: int
    out: int
    stride: int = 1
    squeeze: int = 0
    act: type[nn.Module] = nn.ReLU6


class Backbone(nn.Module):
    """stem - blocks - mix - mean - hidden - classifier: (n, 3, h, w) -> (n, classes).

    `stem`, `mix` and `hidden` are widths, 0 for none.  `stages` is the published table; the blocks
    are numbered through it: `blocks.0`, `blocks.1`, ...  No dropout: it has no parameters, and
    what follows an import here are few updates.
    """

    def __init__(
        self,
        classes: int,
        stem: int,
        stages: Sequence[Sequence[Row]],
        style: Style,
        mix: int = 0,
        hidden: int = 0,
        act: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        rows = [row for stage in stages for row in stage]
        widths = [stem, *(row.out for row in rows)]
        self.stages = tuple(len(stage) for stage in stages)
        self.stem = conv_norm(3, stem, 3, 2, style=style, act=act)
        self.blocks = nn.Sequential(
            *(InvertedResidual(w, row, style) for w, row in zip(widths, rows, strict=False))
        )
        width = widths[-1]
        self.mix: nn.Module = nn.Identity()
        if mix:
            self.mix = conv_norm(width, mix, 1, style=style, act=act)
            width = mix
        self.hidden: nn.Module = nn.Identity()
        if hidden:
            self.hidden = nn.Sequential(OrderedDict(linear=nn.Linear(width, hidden), act=act()))
            width = hidden
        self.classifier = nn.Linear(width, classes)
        self.apply(_initialise)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier sees: (n, 3, h, w) -> (n, width)."""
        x = self.mix(self.blocks(self.stem(x)))
        return self.hidden(x.mean([2, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class InvertedResidual(nn.Sequential):
    """expand 1x1 - depthwise - [squeeze-excite] - project 1x1: (n, c, h, w) -> (n, out, h', w')."""

    def __init__(self, inp: int, row: Row, style: Style) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        hidden, act = row.hidden, row.act
        if hidden != inp:
            parts["expand"] = conv_norm(inp, hidden, 1, style=style, act=act)
        parts["depthwise"] = conv_norm(
            hidden, hidden, row.kernel, row.stride, groups=hidden, style=style, act=act
        )
        if row.squeeze:
            parts["se"] = SqueezeExcite(hidden, row.squeeze)
        parts["project"] = conv_norm(hidden, row.out, 1, style=style, act=None)
        super().__init__(parts)
        self.residual = row.stride == 1 and inp == row.out

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    """x * hardsigmoid(expand(relu(reduce(mean x)))), a gate per channel: (n, c, h, w) -> same."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeeze, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.act(self.reduce(x.mean([2, 3], keepdim=True)))
        return x * self.gate(self.expand(squeezed))


class SameConv2d(nn.Conv2d):
    """A convolution whose output is ceil(size / stride), padded with zeros as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (
            _same(size, kernel, stride)
            for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        )
        return super().forward(F.pad(x, [left, right, top, bottom]))


def conv_norm(
    inp: int,
    out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    style: Style,
    act: type[nn.Module] | None,
) -> nn.Sequential:
    """conv - norm - act: (n, inp, h, w) -> (n, out, h', w').  A folded one is conv - act."""
    pad, make = kernel // 2, nn.Conv2d
    if style.same and stride > 1:  # otherwise kernel // 2 on each side is the same padding
        pad, make = 0, SameConv2d
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = make(inp, out, kernel, stride, pad, groups=groups, bias=style.folded)
    if not style.folded:
        parts["norm"] = nn.BatchNorm2d(out, eps=style.eps, momentum=style.momentum)
    if act is not None:
        parts["act"] = act()
    return nn.Sequential(parts)


def divisible(width: float, by: int = 8) -> int:
    """The nearest multiple of `by`, but never less than nine tenths of the width.

    >>> [divisible(w) for w in (11.2, 22.4, 33.6)]
    [16, 24, 32]
    """
    nearest = max(by, int(width + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * width else nearest


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that the output is ceil(size / stride)."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


def _initialise(module: nn.Module) -> None:
    """He's initialisation over the fan out for convolutions, N(0, 0.01) for linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
