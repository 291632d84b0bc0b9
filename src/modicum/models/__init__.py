"""Reference networks by name.  In the package only the command line depends on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from modicum.models.small import DigitsNet, Mlp, SmallCnn


@dataclass(frozen=True)
class Entry:
    """A named network: how to make it for a number of classes, and the shape of its input."""

    make: Callable[[int], nn.Module]
    input: tuple[int, ...]
    classes: int
    about: str


MODELS: dict[str, Entry] = {
    "digits": Entry(DigitsNet, (1, 1, 8, 8), 6, "the quick start's separable CNN for 8x8 digits"),
    "mlp": Entry(Mlp, (1, 784), 10, "784-64-10 perceptron"),
    "cnn28": Entry(SmallCnn, (1, 1, 28, 28), 10, "two strided convolutions and a linear layer"),
}
