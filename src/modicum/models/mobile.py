"""Published mobile networks as tables of inverted residual blocks.

All take pictures (n, 3, h, w) to (n, classes); the size at which their published weights were
trained is in `modicum.models.MODELS`.  `style` is how the convolutions are normalised and padded.
"""

from __future__ import annotations

from torch import nn

from modicum.models.inverted_residual import FOLDED, PLAIN, Backbone, Row, Style, divisible

V3 = Style(eps=1e-3, momentum=0.01)
TENSORFLOW = Style(eps=1e-3, momentum=0.01, same=True)
PROXYLESS = Style(eps=1e-3)

RE, HS = nn.ReLU, nn.Hardswish
Stages = list[list[tuple[int, int, int, bool, type[nn.Module], int]]]


class MobileNetV2(Backbone):
    """MobileNetV2 of any width (Sandler et al. 2018, arXiv 1801.04381, table 2)."""

    def __init__(self, classes: int = 1000, width: float = 1.0, style: Style = PLAIN) -> None:
        mix = divisible(1280 * max(1.0, width))
        super().__init__(classes, divisible(32 * width), _mobilenet_v2(width), style, mix)


class MobileNetV3(Backbone):
    """The MobileNetV3s (Howard et al. 2019, arXiv 1905.02244): SE gates, hard swish, two layers.

    A row of a table is kernel, width inside, width out, SE or not, activation, stride.  Widths
    other than 1 are rounded as in the weights that are published for them: the expansion is what
    stays, the stem does not go below 16, and the hidden layer is as wide as ever.
    """

    def __init__(
        self, classes: int, width: float, style: Style, table: Stages, hidden: int
    ) -> None:
        stem = divisible(16 * max(0.75, width))
        inp, full = stem, 16  # of this width, and of width 1
        stages = []
        for rows in table:
            stage = []
            for kernel, inside, out, se, act, stride in rows:
                inner = divisible(inp * inside / full)
                inp, full = divisible(out * width), out
                stage.append(
                    Row(kernel, inner, inp, stride, divisible(inner / 4) if se else 0, act)
                )
            stages.append(stage)
        mix = divisible(6 * full * width)
        super().__init__(classes, stem, stages, style, mix, hidden, nn.Hardswish)


class MobileNetV3Small(MobileNetV3):
    """MobileNetV3-Small of any width (table 2 of the paper)."""

    def __init__(self, classes: int = 1000, width: float = 1.0, style: Style = V3) -> None:
        table: Stages = [
            [(3, 16, 16, True, RE, 2)],
            [(3, 72, 24, False, RE, 2), (3, 88, 24, False, RE, 1)],
            [(5, 96, 40, True, HS, 2), (5, 240, 40, True, HS, 1), (5, 240, 40, True, HS, 1)],
            [(5, 120, 48, True, HS, 1), (5, 144, 48, True, HS, 1)],
            [(5, 288, 96, True, HS, 2), (5, 576, 96, True, HS, 1), (5, 576, 96, True, HS, 1)],
        ]
        super().__init__(classes, width, style, table, 1024)


class MobileNetV3Large(MobileNetV3):
    """MobileNetV3-Large of any width (table 1 of the paper)."""

    def __init__(self, classes: int = 1000, width: float = 1.0, style: Style = V3) -> None:
        table: Stages = [
            [(3, 16, 16, False, RE, 1)],
            [(3, 64, 24, False, RE, 2), (3, 72, 24, False, RE, 1)],
            [(5, 72, 40, True, RE, 2), (5, 120, 40, True, RE, 1), (5, 120, 40, True, RE, 1)],
            [
                (3, 240, 80, False, HS, 2),
                (3, 200, 80, False, HS, 1),
                (3, 184, 80, False, HS, 1),
                (3, 184, 80, False, HS, 1),
            ],
            [(3, 480, 112, True, HS, 1), (3, 672, 112, True, HS, 1)],
            [(5, 672, 160, True, HS, 2), (5, 960, 160, True, HS, 1), (5, 960, 160, True, HS, 1)],
        ]
        super().__init__(classes, width, style, table, 1280)


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0: EfficientNet-B0 (arXiv 1905.11946) with ReLU6 and without SE."""

    def __init__(self, classes: int = 1000, style: Style = TENSORFLOW) -> None:
        stages = _expanded(
            32,
            [  # expansion, width, blocks, stride, kernel
                (1, 16, 1, 1, 3),
                (6, 24, 2, 2, 3),
                (6, 40, 2, 2, 5),
                (6, 80, 3, 2, 3),
                (6, 112, 3, 1, 5),
                (6, 192, 4, 2, 5),
                (6, 320, 1, 1, 3),
            ],
        )
        super().__init__(classes, 32, stages, style, 1280)


class ProxylessMobile(Backbone):
    """ProxylessNAS-Mobile (Cai et al. 2019, arXiv 1812.00332, figure 4)."""

    def __init__(self, classes: int = 1000, style: Style = PROXYLESS) -> None:
        stages = [
            [Row(3, 32, 16)],
            [Row(5, 48, 32, 2), Row(3, 96, 32)],
            [Row(7, 96, 40, 2), Row(3, 120, 40), Row(5, 120, 40), Row(5, 120, 40)],
            [Row(7, 240, 80, 2), Row(5, 240, 80), Row(5, 240, 80), Row(5, 240, 80)],
            [Row(5, 480, 96), Row(5, 288, 96), Row(5, 288, 96), Row(5, 288, 96)],
            [Row(7, 576, 192, 2), Row(7, 1152, 192), Row(7, 576, 192), Row(7, 576, 192)],
            [Row(7, 1152, 320)],
        ]
        super().__init__(classes, 32, stages, style, 1280)


# ---- for microcontrollers: 128 x 128, published with their norms folded ----------------------


class Mcunet5fps(Backbone):
    """MCUNet searched for 5 frames per second (Lin et al. 2020, arXiv 2007.10319)."""

    def __init__(self, classes: int = 1000, style: Style = FOLDED) -> None:
        stages = [
            [Row(3, 16, 8)],
            [Row(3, 32, 16, 2), Row(3, 48, 16)],
            [Row(7, 48, 24, 2), Row(3, 120, 24)],
            [Row(3, 120, 40, 2), Row(7, 160, 40)],
            [Row(5, 160, 48), Row(3, 144, 48), Row(3, 192, 48)],
            [Row(7, 240, 96, 2), Row(5, 384, 96), Row(5, 384, 96)],
            [Row(3, 576, 160)],
        ]
        super().__init__(classes, 16, stages, style)


class Mbv2W035(Backbone):
    """MobileNetV2 of width 0.35 without the last 1x1 convolution (112 features)."""

    def __init__(self, classes: int = 1000, style: Style = FOLDED) -> None:
        super().__init__(classes, 16, _mobilenet_v2(0.35), style)


class ProxylessW03(Backbone):
    """ProxylessNAS-Mobile of width 0.3 without the last 1x1 convolution (96 features)."""

    def __init__(self, classes: int = 1000, style: Style = FOLDED) -> None:
        stages = [
            [Row(3, 16, 8)],
            [Row(5, 24, 16, 2), Row(3, 48, 16)],
            [Row(7, 48, 16, 2), Row(3, 48, 16), Row(5, 48, 16), Row(5, 48, 16)],
            [Row(7, 96, 24, 2), Row(5, 72, 24), Row(5, 72, 24), Row(5, 72, 24)],
            [Row(5, 144, 32), Row(5, 96, 32), Row(5, 96, 32), Row(5, 96, 32)],
            [Row(7, 192, 64, 2), Row(7, 384, 64), Row(7, 192, 64), Row(7, 192, 64)],
            [Row(7, 384, 96)],
        ]
        super().__init__(classes, 16, stages, style)


def _mobilenet_v2(width: float) -> list[list[Row]]:
    table = [  # expansion, width, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    rows = [(t, divisible(c * width), n, s, 3) for t, c, n, s in table]
    return _expanded(divisible(32 * width), rows)


def _expanded(width: int, table: list[tuple[int, int, int, int, int]]) -> list[list[Row]]:
    """Stages from (expansion, width, blocks, stride of the first block, kernel)."""
    stages = []
    for expansion, out, blocks, stride, kernel in table:
        stage = []
        for i in range(blocks):
            stage.append(Row(kernel, expansion * width, out, stride if i == 0 else 1))
            width = out
        stages.append(stage)
    return stages
