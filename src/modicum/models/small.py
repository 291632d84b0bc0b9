"""Networks for small images: plain definitions, no options."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """A residual separable CNN for 8x8 grey images: (n, 1, 8, 8) -> (n, classes)."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.stem = _conv(1, 24, 3)
        self.depthwise = _conv(24, 24, 3, groups=24)
        self.pointwise = nn.Sequential(nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.expand = _conv(24, 48, 1)
        self.down = _conv(48, 48, 3, stride=2, groups=48)
        self.mix = _conv(48, 64, 1)
        self.head = nn.Linear(64 * 4, classes)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.pointwise(self.depthwise(x))
        x = self.pool(self.mix(self.down(self.expand(x))))
        return self.head(x.flatten(1))


class Mlp(nn.Module):
    """784-64-classes with ReLU: (n, 784) -> (n, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SmallCnn(nn.Module):
    """conv 8 and conv 16, both stride 2, and a linear layer: (n, 1, 28, 28) -> (n, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16 * 49, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def _conv(inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())
