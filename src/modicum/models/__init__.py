"""Reference networks by name.  In the package only the command line depends on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from modicum.models.fewshot import Conv4, GaussianPolicy, ResNet12, SineNet
from modicum.models.inverted_residual import FOLDED, Backbone, Style
from modicum.models.keyword import CharacterNet, KeywordNet
from modicum.models.mobile import (
    TENSORFLOW,
    EfficientNetLite0,
    Mbv2W035,
    Mcunet5fps,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ProxylessMobile,
    ProxylessW03,
)
from modicum.models.small import DigitsNet, Mlp, SmallCnn
from modicum.models.sources import names
from modicum.models.weights import Loaded, load_weights, read_weights

__all__ = [
    "FOLDED",
    "MODELS",
    "TENSORFLOW",
    "Backbone",
    "CharacterNet",
    "Conv4",
    "DigitsNet",
    "EfficientNetLite0",
    "Entry",
    "GaussianPolicy",
    "KeywordNet",
    "Loaded",
    "Mbv2W035",
    "Mcunet5fps",
    "Mlp",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "ProxylessMobile",
    "ProxylessW03",
    "ResNet12",
    "SineNet",
    "SmallCnn",
    "Style",
    "load_weights",
    "names",
    "read_weights",
]

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """A named network: how to make it for a number of classes, and the shape of its input.

    `normalise` is what its published weights expect of a picture: (pixel - mean) / std per
    channel (red, green, blue), for pixels from 0 to 1; None where there are none.
    """

    make: Callable[[int], nn.Module]
    input: tuple[int, ...]
    classes: int
    about: str
    normalise: tuple[Rgb, Rgb] | None = None


IMAGENET: tuple[Rgb, Rgb] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED: tuple[Rgb, Rgb] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # x / 127.5 - 1 of a byte
LITE: tuple[Rgb, Rgb] = ((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128 of a byte


def _pictures(
    make: Callable[[int], nn.Module], size: int, about: str, normalise: tuple[Rgb, Rgb]
) -> Entry:
    return Entry(make, (1, 3, size, size), 1000, about, normalise)


MODELS: dict[str, Entry] = {
    "digits": Entry(DigitsNet, (1, 1, 8, 8), 6, "the quick start's separable CNN for 8x8 digits"),
    "mlp": Entry(Mlp, (1, 784), 10, "784-64-10 perceptron"),
    "cnn28": Entry(SmallCnn, (1, 1, 28, 28), 10, "two strided convolutions and a linear layer"),
    "conv4-32": Entry(Conv4, (1, 1, 28, 28), 5, "Conv4 of few-shot learning, 32 filters"),
    "conv4-64": Entry(
        lambda n: Conv4(n, 64, 3, 64), (1, 3, 64, 64), 5, "Conv4 of few-shot learning, 64 filters"
    ),
    "resnet12": Entry(ResNet12, (1, 3, 64, 64), 5, "ResNet-12 of few-shot learning"),
    "sine": Entry(SineNet, (1, 1), 1, "1-40-40-1 regressor of sine waves"),
    "keyword": Entry(KeywordNet, (1, 1, 32, 20), 10, "separable CNN for log-mels of spoken words"),
    "character": Entry(
        CharacterNet, (1, 1, 28, 28), 5, "four strided convolutions and a linear layer"
    ),
    "mcunet-5fps": _pictures(
        Mcunet5fps, 128, "MCUNet for 5 frames per second, norms folded", CENTRED
    ),
    "mbv2-w0.35": _pictures(Mbv2W035, 128, "MobileNetV2 of width 0.35, norms folded", CENTRED),
    "proxyless-w0.3": _pictures(
        ProxylessW03, 128, "ProxylessNAS of width 0.3, norms folded", CENTRED
    ),
    "mobilenet_v2": _pictures(MobileNetV2, 224, "MobileNetV2, ReLU6", IMAGENET),
    "mobilenet_v3_small": _pictures(
        MobileNetV3Small, 224, "MobileNetV3-Small, gates and hard swish", IMAGENET
    ),
    "mobilenet_v3_large": _pictures(
        MobileNetV3Large, 224, "MobileNetV3-Large, gates and hard swish", IMAGENET
    ),
    "efficientnet_lite0": _pictures(
        EfficientNetLite0, 224, "EfficientNet-Lite0, ReLU6, same padding", LITE
    ),
    "proxyless_mobile": _pictures(
        ProxylessMobile, 224, "ProxylessNAS-Mobile, kernels up to 7x7", IMAGENET
    ),
}
