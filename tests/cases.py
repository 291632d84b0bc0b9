"""THE table of models, methods, optimisers and boards that the tests run over.

A row is one plan.  Every operator, every kind of slice, every optimiser and both losses are in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from oracle import randomise, samples
from torch import Tensor, nn

import modicum as mo
from modicum.graph import Graph
from modicum.heads import few_shot
from modicum.lite import StandardisedConv2d, add_lite_residuals
from modicum.methods import Bias, Blocks, Explicit, Full, Last, Method, MobileTL, Norm, TinyTL
from modicum.optim import SGD, Adam
from modicum.plan import Plan

# ---- nets ------------------------------------------------------------------------------------


class Fn(nn.Module):
    """Named layers and a forward pass written as a function of them and x."""

    def __init__(self, forward: Callable[[Fn, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Net:
    """A model, the shape of one sample, and the loss that it is trained with."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: str = "cross_entropy"


def _mobile() -> nn.Module:
    """An inverted residual block with norms, as in MobileNetV2."""

    def forward(m: Fn, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.mix(x + m.block(x)).mean([2, 3]))

    block = seq(
        *(nn.Conv2d(5, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10)),
        *(nn.ReLU6(inplace=True), nn.Conv2d(10, 5, 1, bias=False), nn.BatchNorm2d(5)),
    )
    stem = seq(nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU6(inplace=True))
    mix = seq(nn.Conv2d(5, 7, 1), nn.ReLU6())
    return Fn(forward, stem=stem, block=block, mix=mix, head=nn.Linear(7, 4))


def inverted(inp: int, out: int, stride: int = 1) -> nn.Module:
    """An inverted residual block that is a module, as in MobileNetV2."""
    wide = 2 * inp
    body = seq(
        *(nn.Conv2d(inp, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
        *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)),
        *(nn.ReLU6(), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
    )
    if stride > 1 or inp != out:
        return body
    return Fn(lambda m, x: x + m.body(x), body=body)


def _lite() -> nn.Module:
    """Lite residuals over maps of 7x6, 4x3 (strided) and 2x2 (a global mean) pixels."""
    stem = seq(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
    blocks = seq(inverted(6, 6), inverted(6, 8, 2), inverted(8, 8, 2), inverted(8, 8))
    net = seq(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return add_lite_residuals(net, torch.zeros(1, 3, 13, 11))


def _gated() -> nn.Module:
    """Two inverted residual blocks with gates and hard swishes, as in MobileNetV3."""

    def forward(m: Fn, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in (m.block, m.last):
            y = block[1](block[0](x))
            y = y * block[2](y)  # squeeze and excite
            x = x + block[3](y)
        return m.head(m.mix(x).mean([2, 3]))

    def norm(conv: nn.Module, act: type[nn.Module] | None = nn.Hardswish) -> nn.Module:
        return seq(conv, nn.BatchNorm2d(conv.out_channels), *([act()] if act else []))

    def block(gate: type[nn.Module]) -> nn.Module:
        squeeze = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(9, 3, 1), nn.ReLU(), nn.Conv2d(3, 9, 1))
        return seq(
            norm(nn.Conv2d(5, 9, 1, bias=False)),
            norm(nn.Conv2d(9, 9, 3, 1, 1, groups=9)),
            seq(*squeeze, gate()),
            norm(nn.Conv2d(9, 5, 1, bias=False), None),
        )

    stem = norm(nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.SiLU)
    mix = norm(nn.Conv2d(5, 7, 1), nn.ReLU6)
    head = nn.Linear(7, 4)
    blocks = {"block": block(nn.Sigmoid), "last": block(nn.Hardsigmoid)}
    return Fn(forward, stem=stem, mix=mix, head=head, **blocks)


def _curves(m: Fn, x: Tensor) -> Tensor:
    x = F.silu(m.a(x))
    x = F.interpolate(x, scale_factor=2, mode="nearest") * F.hardswish(
        m.b(F.interpolate(x, (8, 6)))
    )
    x = F.interpolate(m.group(x), (5, 9), mode="bilinear") * torch.sigmoid(
        m.c(x).mean((2, 3), True)
    )
    x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)
    x = m.plain(F.hardsigmoid(x) * x).flatten(1)
    x = m.wide(x)
    return m.head(F.relu6(m.flat(x)) * x)


def _residuals(m: Fn, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = F.relu6(m.b(a))
    x = a + b  # two clamps; a is used three times
    x = F.relu(x + m.c(a))
    x = x + x
    y = m.d(x)
    y += x
    return m.head(y.mean((-1, -2), keepdim=True).flatten(1))


def _concats(m: Fn, x: Tensor) -> Tensor:
    a, b = m.a(x), F.relu(m.b(x))
    x = torch.cat([a, b, a], 1)
    x = torch.cat([F.relu6(x), m.c(x)], 2)
    x = torch.cat([x, m.d(x)], -1)
    x = F.adaptive_avg_pool2d(x, (2, 1)).flatten(1)
    return m.head(torch.cat([x, F.relu(m.e(x))], dim=1))


def _same_and_pad(m: Fn, x: Tensor) -> Tensor:
    x = F.relu(m.even(x))  # 'same' with an even kernel pads one side more
    x = F.relu(m.shifted(F.pad(x, (2, 0, 0, 1))))
    x = F.hardtanh(m.both(F.pad(x, (0, 1))))  # a pad and the convolution's own
    return m.head(x.flatten(1))


def _branches_of_one_input(m: Fn, x: Tensor) -> Tensor:
    return m.head((m.a(x) + F.relu(m.b(x))).mean([2, 3]))


def _views(m: Fn, x: Tensor) -> Tensor:
    x = F.relu(m.conv(x)).reshape(x.shape[0], 6, -1)  # image -> rows
    x = F.relu(m.rows(x)).view(x.shape[0], -1)
    x = F.relu(m.wide(x)).unflatten(1, (4, 3, 2))  # vector -> image
    return m.head(m.image(x).flatten(1))


def _kept_twice(m: Fn, x: Tensor) -> Tensor:
    """Rows and the flat vector of the same elements are both kept."""
    rows = F.relu(m.stem(x))
    return m.a(rows).flatten(1) + m.b(rows.flatten(1))


def _frozen_twice(m: Fn, x: Tensor) -> Tensor:
    """One convolution at two places, which cannot be trained but can be passed through."""
    x = F.relu(m.twice(F.relu(m.twice(m.first(x)))))
    return m.head(x.mean([2, 3]))


def _like_sounding(m: Fn, x: Tensor) -> Tensor:
    """conv.1 and conv_1 are one identifier in C."""
    x = F.relu(m.conv(x)) + F.relu(m.conv_1(x))
    return m.head(x.mean([2, 3]))


NETS: dict[str, Net] = {
    "linear": Net(lambda: nn.Linear(6, 3), (6,)),
    "mlp": Net(lambda: seq(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU6(),
                           nn.Dropout(0.5), nn.Linear(7, 4)), (6,)),
    "rows": Net(lambda: seq(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False),
                            nn.Hardtanh(), nn.Flatten(), nn.Linear(15, 4)), (5, 6)),
    "regression": Net(lambda: seq(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(),
                                  nn.Linear(8, 3), nn.ReLU()), (5,), "mse"),
    "conv": Net(lambda: seq(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
                            nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(inplace=True),
                            nn.Dropout2d(), nn.Flatten(), nn.Linear(36, 4)), (3, 7, 6)),
    "kernels": Net(lambda: seq(nn.Conv2d(2, 6, (1, 4), stride=(2, 1), padding=(2, 0)), nn.ReLU6(),
                               nn.Conv2d(6, 9, (5, 2), dilation=(1, 2), padding=(2, 1)),
                               nn.Hardtanh(), nn.Conv2d(9, 5, 2, bias=False),
                               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)), (2, 7, 8)),
    "padding": Net(lambda: Fn(_same_and_pad, even=nn.Conv2d(2, 5, (2, 4), padding="same"),
                              shifted=nn.Conv2d(5, 4, 3, stride=2),
                              both=nn.Conv2d(4, 4, 2, padding=1, dilation=2),
                              head=nn.Linear(48, 4)), (2, 7, 6)),
    "groups": Net(lambda: seq(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(),
                              nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.Hardtanh(),
                              nn.Conv2d(8, 16, (1, 2), groups=8), nn.ReLU6(),
                              nn.Conv2d(16, 6, 1), nn.Flatten(), nn.Linear(54, 4)), (4, 7, 9)),
    "norms": Net(lambda: seq(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6),
                             nn.ReLU(inplace=True), nn.MaxPool2d(2),
                             nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 5, 2),
                             nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.Linear(20, 6),
                             nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 4)), (3, 8, 9)),
    "max pools": Net(lambda: seq(nn.Conv2d(2, 5, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.ReLU(),
                                 nn.Conv2d(5, 6, 1), nn.MaxPool2d((2, 3), (1, 2), dilation=(2, 1)),
                                 nn.Conv2d(6, 5, 1), nn.MaxPool2d(5, 1, 2),
                                 nn.MaxPool2d(2, 2, ceil_mode=True), nn.Flatten(),
                                 nn.Linear(20, 4)), (2, 9, 13)),
    "average pools": Net(lambda: seq(nn.Conv2d(2, 5, 2),
                                     nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.ReLU(),
                                     nn.Conv2d(5, 6, 2), nn.AvgPool2d((1, 2), 1, ceil_mode=True),
                                     nn.AvgPool2d(2, 1, 1, divisor_override=3), nn.Conv2d(6, 4, 1),
                                     nn.AvgPool2d(2, 2, 1, ceil_mode=True),
                                     nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveAvgPool2d((None, 2)),
                                     nn.Flatten(), nn.Linear(16, 4)), (2, 9, 11)),
    "residuals": Net(lambda: Fn(_residuals, a=nn.Conv2d(3, 5, 3, padding=1),
                                b=nn.Conv2d(5, 5, 1), c=nn.Conv2d(5, 5, 3, padding=1, groups=5),
                                d=nn.Conv2d(5, 5, 1), head=nn.Linear(5, 4)), (3, 5, 6)),
    "concats": Net(lambda: Fn(_concats, a=nn.Conv2d(2, 3, 1), b=nn.Conv2d(2, 4, 1),
                              c=nn.Conv2d(10, 10, 3, padding=(0, 1), groups=2),
                              d=nn.Conv2d(10, 10, (1, 3), groups=10), e=nn.Linear(20, 5),
                              head=nn.Linear(25, 4)), (2, 5, 6)),
    "mobile": Net(_mobile, (3, 9, 8)),
    "gated": Net(_gated, (3, 9, 8)),
    "curves": Net(lambda: Fn(_curves, a=nn.Conv2d(2, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1),
                             c=nn.Conv2d(6, 6, 1), group=nn.GroupNorm(2, 6),
                             plain=nn.GroupNorm(3, 6, affine=False), wide=nn.Linear(48, 10),
                             flat=nn.GroupNorm(2, 10), head=nn.Linear(10, 4)), (2, 4, 3)),
    "one input": Net(lambda: Fn(_branches_of_one_input, a=nn.Conv2d(6, 5, 1),
                                b=nn.Conv2d(6, 5, 3, padding=1), head=nn.Linear(5, 3)), (6, 4, 5)),
    "views": Net(lambda: Fn(_views, conv=nn.Conv2d(2, 6, 2), rows=nn.Linear(12, 5),
                            wide=nn.Linear(30, 24), image=nn.Conv2d(4, 3, 2),
                            head=nn.Linear(6, 4)), (2, 4, 5)),
    "kept twice": Net(lambda: Fn(_kept_twice, stem=nn.Linear(4, 6), a=nn.Linear(6, 2),
                                 b=nn.Linear(18, 6)), (3, 4)),
    "frozen twice": Net(lambda: Fn(_frozen_twice, first=nn.Conv2d(2, 4, 1),
                                   twice=nn.Conv2d(4, 4, 3, padding=1),
                                   head=nn.Linear(4, 3)), (2, 5, 5)),
    "like-sounding": Net(lambda: Fn(_like_sounding, conv=seq(nn.Conv2d(2, 4, 1),
                                                             nn.Conv2d(4, 4, 3, padding=1)),
                                    conv_1=nn.Conv2d(2, 4, 3, padding=1),
                                    head=nn.Linear(4, 3)), (2, 4, 5)),
    "lite": Net(_lite, (3, 13, 11)),
    "standardised": Net(lambda: seq(StandardisedConv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6),
                                    nn.ReLU(), StandardisedConv2d(6, 6, 3, 2, 1, groups=6),
                                    nn.GroupNorm(2, 6), nn.ReLU(),
                                    StandardisedConv2d(6, 8, (1, 3), groups=2), nn.ReLU6(),
                                    StandardisedConv2d(8, 40, 3, padding=1),  # in two blocks
                                    nn.GroupNorm(5, 40), nn.Flatten(), nn.Linear(160, 4)),
                        (3, 6, 9)),
    "few shot": Net(lambda: few_shot(seq(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6),
                                         nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.Hardswish(),
                                         nn.Conv2d(6, 9, 1), nn.AdaptiveAvgPool2d((2, 1)),
                                         nn.Flatten(), nn.Linear(18, 10)), 4), (3, 8, 7)),
}  # fmt: skip


# ---- the table -------------------------------------------------------------------------------


PLAIN = SGD(lr=0.05)


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a net, what is updated in it, and how."""

    net: str
    method: Method
    optimizer: SGD | Adam = PLAIN
    accumulate: int = 1
    board: str | None = None
    note: str = ""

    @property
    def id(self) -> str:
        kind = type(self.method).__name__
        text = f"{kind}{getattr(self.method, 'n', '')}{getattr(self.method, 'head', '')}"
        rule = (
            "Momentum" if getattr(self.optimizer, "momentum", 0) else type(self.optimizer).__name__
        )
        parts = [self.net, self.note or text, rule]
        parts += [f"x{self.accumulate}"] if self.accumulate > 1 else []
        return "-".join(parts + ([self.board] if self.board else [])).replace(" ", "_")


def only(note: str, net: str, params: dict[str, dict[str, tuple[int, ...]] | None], **more) -> Case:
    return Case(net, Explicit(params=params), note=note, **more)


MOMENTUM = SGD(lr=0.03, momentum=0.9, weight_decay=0.01)
ADAM = Adam(lr=0.01)
DECAY = Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02)

CASES: list[Case] = [
    # whole layers
    *(Case(net, Full()) for net in NETS if net != "frozen twice"),
    *(Case(net, Last(n=1)) for net in NETS),
    *(Case(net, Last(n=2)) for net in NETS if net not in ("linear", "frozen twice")),
    *(Case(net, Bias()) for net in NETS if net != "frozen twice"),
    *(Case(net, Bias(head=0)) for net in ("mlp", "norms", "mobile", "max pools", "residuals")),
    only("first", "frozen twice", {"first.*": None}),
    # channels of a convolution: out, in, both
    only("out", "conv", {"0.*": {"out": (0, 2, 5)}, "2.weight": {"out": (1, 4)}}),
    only("in", "conv", {"0.weight": {"inp": (1,)}, "2.weight": {"inp": (0, 3, 4, 7)}}),
    only("both", "conv", {"0.weight": {"out": (7,), "inp": (0, 2)},
                          "2.*": {"out": (0, 1, 2, 5), "inp": (2, 6)}, "6.*": None}),
    only("all listed", "conv", {"2.weight": {"out": tuple(range(6)), "inp": tuple(range(8))}}),
    only("pointwise", "mobile", {"block.0.weight": {"out": (1, 8), "inp": (0, 4)},
                                 "block.6.weight": {"inp": (3, 4, 9)}}),
    only("same channels", "one input", {"?.weight": {"inp": (0, 2, 3)}}),
    only("other channels", "one input", {"a.weight": {"inp": (0, 2)}, "b.weight": {"inp": (1, 2)}}),
    only("whole and channels", "one input", {"a.weight": None, "b.weight": {"inp": (5,)}}),
    only("dilated", "kernels", {"2.weight": {"out": (0, 8), "inp": (1, 5)}, "0.bias": None}),
    only("padded", "padding", {"*.weight": {"out": (0, 2), "inp": (1,)}}),
    # depthwise and grouped convolutions
    only("depthwise", "mobile", {"block.3.weight": {"out": (0, 1, 9)}, "block.4.*": None}),
    only("grouped", "groups", {"0.*": {"out": (0, 3, 4, 5)}, "2.*": {"out": (1, 6, 7)},
                               "4.*": {"out": (0, 1, 2, 9, 15)}}),
    only("inside groups", "groups", {"0.weight": {"out": (0, 1, 5), "inp": (1,)},
                                     "4.weight": {"out": (4, 5, 9, 10)}}),
    only("one group", "groups", {"0.weight": {"out": (6, 7)}, "2.bias": None}, accumulate=2),
    only("input channels", "groups", {"0.weight": {"inp": (0,)}, "6.weight": {"inp": (2, 9)}}),
    # linear layers
    only("out", "mlp", {"0.*": {"out": (8,)}, "2.weight": {"out": (0, 3)}}),
    only("in", "mlp", {"2.weight": {"inp": (0, 4, 8)}, "5.weight": {"inp": (6,)}}),
    only("both", "rows", {"0.*": {"out": (1, 2), "inp": (0, 5)}, "2.weight": {"inp": (3, 4)},
                          "5.*": {"out": (0, 3), "inp": (1, 14)}}),
    # norms: scale, shift, both, some channels; in place of a fold
    only("scale", "norms", {"0.weight": None, "2.weight": {"out": (0, 5)}, "10.weight": None}),
    only("shift", "norms", {"0.bias": {"out": (1,)}, "2.bias": None, "10.*": {"out": (2, 3)}}),
    only("under a norm", "mobile", {"stem.0.weight": None, "block.3.weight": None}),
    only("sliced scales", "curves", {"group.*": {"out": (0, 5)}, "flat.*": {"out": (1, 2, 7)}}),
    only("sliced scales", "curves", {"a.bias": None, "group.weight": {"out": (2,)},
                                     "flat.*": {"out": (0, 9)}}, accumulate=2),
    Case("norms", Explicit(params={"0.weight": {"out": (0, 2)}, "2.*": {"out": (1, 4)}},
                           batch_norms=("0", "2")), ADAM, 2, note="sliced scales"),
    # norms with batch statistics, activations with sign masks
    Case("gated", MobileTL(blocks=1), note="MobileTL"),
    Case("gated", MobileTL(blocks=2, last_norm="batch"), MOMENTUM, note="MobileTL batch"),
    Case("gated", MobileTL(blocks=2, shift_only=False), note="sign only"),
    Case("gated", MobileTL(blocks=2, sign_backward=False), ADAM, 3, note="shift only"),
    Case("gated", Blocks(blocks=1), note="block batch"),
    Case("gated", Blocks(blocks=2, norms="affine"), ADAM, 3, note="blocks affine"),
    Case("gated", Norm(), note="norms"),
    Case("mobile", MobileTL(blocks=1), MOMENTUM, 2, note="MobileTL"),
    Case("mobile", MobileTL(blocks=1, last_norm="batch"), note="MobileTL batch"),
    Case("mobile", Full(norms="batch"), ADAM, 3, note="batch"),
    Case("norms", Norm(head=0), note="norms"),
    Case("mobile", Explicit(params={"*.bias": None}, sign=("*",)), note="masks of signs"),
    Case("gated", Explicit(params={"*.bias": None}, sign=("*",)), note="masks of signs"),
    # optimisers and accumulation
    *(Case(net, Full(), MOMENTUM) for net in ("mlp", "conv", "norms")),
    Case("mlp", Full(), SGD(lr=0.05, weight_decay=0.1), note="decay"),
    *(Case(net, Full(), ADAM) for net in ("rows", "groups", "regression")),
    *(Case(net, Full(), SGD(lr=0.05), 3) for net in ("conv", "norms", "concats", "residuals")),
    Case("mobile", Full(), MOMENTUM, 3),
    Case("groups", Full(), DECAY, 3),
    Case("regression", Full(), DECAY, 2),
    Case("mobile", Bias(), ADAM, 3),
    only("slices", "groups", {"*": {"out": (0, 1, 3)}}, optimizer=ADAM, accumulate=3),
    only("slices", "norms", {"*": {"out": (0, 2)}}, optimizer=MOMENTUM, accumulate=2),
    only("slices", "mobile", {"*.0.weight": {"out": (0, 3), "inp": (0, 2)},
                              "block.*": {"out": (1,)}, "head.*": {"inp": (0, 6)}},
         optimizer=MOMENTUM),
    only("slices", "views", {"*": {"out": (0, 2), "inp": (0, 1)}}, optimizer=ADAM),
    # lite residual modules, and the standardised weights in them
    Case("lite", TinyTL(mode="lite"), note="lite"),
    Case("lite", TinyTL(), ADAM, 3, note="lite and bias"),
    Case("lite", TinyTL(mode="bias"), note="backbone bias"),
    Case("standardised", Full(), MOMENTUM, 3),
    only("frozen below", "standardised", {"6.weight": None, "4.*": None}),
    # prototypes of classes
    only("slices", "few shot", {"*.3.*": {"out": (0, 2, 5)}, "*.5.weight": {"inp": (1, 3)}},
         optimizer=ADAM, accumulate=3),
    # boards
    Case("mobile", Full(), board="nano33ble"),
    Case("conv", Bias(), ADAM, board="stm32f746"),
]  # fmt: skip


def paced(note: str, net: str, params: dict[str, object], **more) -> Case:
    """A row whose inner steps differ: `params` are tuples of rates, or channels with `rates`."""
    optimizer, accumulate = more.pop("optimizer", PLAIN), more.pop("accumulate", 1)
    given = {k: {"rates": v} if isinstance(v, tuple) else v for k, v in params.items()}
    return Case(net, Explicit(params=given, **more), optimizer, accumulate, note=f"{note} by step")


SOME = (1.0, 0.0, 0.5)
LATER = (0.0, 1.0, 1.0, 0.0)
STEPS: list[Case] = [
    paced("rates", "mlp", {"0.*": (1.0, -0.25, 2.0), "5.*": (1.0,)}),
    paced("layers", "mobile", {"head.*": None, "block.0.weight": SOME, "stem.0.weight": LATER,
                               "block.3.weight": {"out": (0, 1, 9), "rates": (0.0, 1.0)}}),
    paced("layers", "conv", {"0.*": LATER, "2.*": SOME, "6.*": None}, optimizer=MOMENTUM,
          accumulate=2),
    paced("slices", "groups", {"0.*": {"out": (0, 3, 4, 5), "rates": LATER}, "2.*": SOME,
                               "4.*": {"out": (0, 1, 2, 9, 15), "rates": (2.0, 0.0)},
                               "8.*": {"inp": (0, 7), "rates": (0.0, 1.0)}},
          optimizer=DECAY, accumulate=3),
    paced("norms", "norms", {"1.weight": SOME, "2.weight": (0.0, 1.0, 1.0), "2.bias": LATER,
                             "9.weight": (0.0, 1.0), "10.*": (1.0,), "0.*": LATER},
          optimizer=MOMENTUM),
    paced("joined norms", "norms", {"1.weight": SOME, "2.weight": SOME, "2.bias": (1.0, 0.7),
                                    "6.weight": LATER, "12.bias": None}, accumulate=2),
    paced("batch norms", "mobile", {"block.*": LATER, "stem.1.bias": SOME, "head.*": None},
          optimizer=ADAM, accumulate=2, batch_norms=("stem.1", "block.4")),
    paced("signs", "gated", {"block.*": LATER, "last.*": SOME, "head.*": None},
          optimizer=ADAM, sign=("*",)),
    paced("standardised", "standardised", {"0.weight": (0.0, 1.0), "3.weight": SOME, "6.*": LATER,
                                           "11.*": None}, optimizer=MOMENTUM, accumulate=2),
    paced("regression", "regression", {"0.*": SOME, "3.weight": (1.0,), "1.bias": LATER},
          optimizer=DECAY, accumulate=2),
    paced("prototypes", "few shot", {"*.0.weight": LATER,
                                     "*.3.*": {"out": (0, 2, 5), "rates": SOME},
                                     "*.5.weight": {"inp": (1, 3), "rates": (0.5, 1.0)}},
          optimizer=ADAM, accumulate=2),
]  # fmt: skip
"""Plans whose inner steps differ, most of them in what they update."""


# ---- what a row makes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    case: Case
    model: nn.Module
    graph: Graph
    plan: Plan

    def samples(self, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        return samples(self.graph, self.plan.loss, n, seed)


@cache
def captured(net: str) -> tuple[nn.Module, Graph]:
    """One model per net; tests leave it as it is."""
    model = randomise(NETS[net].make(), seed=len(net))
    return model, mo.capture(model, torch.zeros(1, *NETS[net].shape))


@cache
def build(case: Case) -> Built:
    model, graph = captured(case.net)
    plan = mo.plan(
        graph,
        case.board,
        case.method,
        case.optimizer,
        loss=NETS[case.net].loss,
        accumulate=case.accumulate,
    )
    return Built(case, model, graph, plan)
