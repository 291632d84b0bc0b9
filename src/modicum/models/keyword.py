"""Networks that learn sample by sample on a microcontroller: spoken words, written characters.

No batch norms: a batch of one has no statistics.  Group norms allow larger steps; without them, the
default, new clients do as well, and a step needs less memory and time.  Weights start as He et al.
(ICCV 2015, arXiv 1502.01852) have them, so that signals keep their size, and biases at 0.
"""

from __future__ import annotations

from torch import Tensor, nn


class KeywordNet(nn.Module):
    """A separable CNN for words: features (n, 1, frames, mels) -> (n, classes).

    A strided convolution, depthwise separable blocks, the mean over time and frequency, a linear
    head: DS-CNN of Zhang et al., Hello Edge, 2017 (arXiv 1711.07128), smaller and without norms;
    with `groups`, group norms stand where it has batch norms.
    """

    def __init__(
        self, classes: int = 10, filters: int = 32, blocks: int = 3, groups: int = 0
    ) -> None:
        super().__init__()
        self.stem = _conv(1, filters, 5, 2, groups)
        self.blocks = nn.Sequential(
            *(_separable(filters, 2 if i == 0 else 1, groups) for i in range(blocks))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(filters, classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class CharacterNet(nn.Module):
    """Four strided 3x3 convolutions and a linear head: (n, 1, 28, 28) -> (n, classes).

    The Omniglot network of Reptile (Nichol et al., 2018, arXiv 1803.02999), narrower and without
    norms; with `groups`, group norms stand where it has batch norms.
    """

    def __init__(self, classes: int = 5, filters: int = 32, groups: int = 0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _conv(1, filters // 2, 3, 2, groups),
            _conv(filters // 2, filters, 3, 2, groups),
            _conv(filters, filters, 3, 2, groups),
            _conv(filters, filters, 3, 2, groups),
        )
        self.head = nn.Linear(filters * 4, classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).flatten(1))


def _start(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _separable(filters: int, stride: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(filters, filters, 3, stride, groups, depthwise=True),
        _conv(filters, filters, 1, 1, groups),
    )


def _conv(
    inp: int, out: int, kernel: int, stride: int, groups: int, depthwise: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d(
        inp, out, kernel, stride, kernel // 2, groups=inp if depthwise else 1, bias=not groups
    )
    return nn.Sequential(conv, *([nn.GroupNorm(groups, out)] if groups else []), nn.ReLU())
