"""Networks of few-shot learning: Conv4, ResNet-12, the sine regressor, a policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Conv4(nn.Module):
    """Four times 3x3 convolution, batch norm, ReLU, 2x2 max-pooling, and a linear head.

    (n, channels, size, size) -> (n, classes); Vinyals et al., NeurIPS 2016 (arXiv 1606.04080).
    """

    def __init__(
        self, classes: int = 5, filters: int = 32, channels: int = 1, size: int = 28
    ) -> None:
        super().__init__()
        side = size >> 4
        self.blocks = nn.Sequential(
            *(_block(channels if i == 0 else filters, filters) for i in range(4))
        )
        self.head = nn.Linear(filters * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).flatten(1))


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, ReLU and max-pooling; mean, linear head.

    (n, channels, h, w) -> (n, classes); h and w at least 16.  Filters as in Lee et al.,
    CVPR 2019 (arXiv 1904.03758), with ReLU for its leaky one and without its dropout, so that the
    C has every layer.  `width` scales the filters.
    """

    def __init__(self, classes: int = 5, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        filters = [max(1, round(width * n)) for n in (64, 160, 320, 640)]
        self.blocks = nn.Sequential(
            *(_Residual(i, o) for i, o in zip([channels, *filters], filters, strict=False))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(filters[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(x)).flatten(1))


class _Residual(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(layer for i in range(3) for layer in _conv_norm(inp if i == 0 else out, out, i < 2))
        )
        self.short = nn.Sequential(nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out))
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.body(x) + self.short(x)))


class SineNet(nn.Module):
    """1-40-40-1 with ReLU: (n, 1) -> (n, 1); the regressor of MAML (Finn et al., ICML 2017)."""

    def __init__(self, classes: int = 1, hidden: int = 40) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GaussianPolicy(nn.Module):
    """Two hidden layers with ReLU, then the mean of a Gaussian with learned log deviations.

    (n, observations) -> mean (n, actions); `log_std` (actions,), kept above `least`.
    """

    def __init__(
        self, observations: int, actions: int, hidden: Sequence[int] = (100, 100),
        init_std: float = 1.0, least_std: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = [observations, *hidden]
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [_linear(i, o), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _linear(sizes[-1], actions))
        self.log_std = nn.Parameter(torch.full((actions,), init_std).log())
        self.least = torch.tensor(least_std).log().item()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def std(self) -> Tensor:
        return self.log_std.clamp(min=self.least).exp()


def _block(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)
    )


def _conv_norm(inp: int, out: int, act: bool) -> list[nn.Module]:
    layers = [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
    return [*layers, nn.ReLU()] if act else layers


def _linear(inp: int, out: int) -> nn.Linear:
    layer = nn.Linear(inp, out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
