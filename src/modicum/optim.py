"""Optimisers: the update rule's name in C, its hyper-parameters and its state per parameter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from modicum.graph import Frozen

Rate = Annotated[float, Field(ge=0.0, lt=float("inf"))]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class SGD(Frozen):
    """v = momentum * v + (g + weight_decay * w); w -= lr * v.  Without momentum v is not kept."""

    kind: Literal["sgd"] = "sgd"
    lr: Rate = 0.01
    momentum: Fraction = 0.0
    weight_decay: Rate = 0.0

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the values kept per trained element."""
        return ("v",) if self.momentum else ()

    def __str__(self) -> str:
        return f"SGD(lr={self.lr:g}" + (f", momentum={self.momentum:g})" if self.momentum else ")")


class Adam(Frozen):
    """Adam as in torch.optim.Adam, with bias correction and epsilon outside the square root."""

    kind: Literal["adam"] = "adam"
    lr: Rate = 0.001
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-8
    weight_decay: Rate = 0.0

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    def __str__(self) -> str:
        return f"Adam(lr={self.lr:g})"


Optimizer = Annotated[SGD | Adam, Field(discriminator="kind")]
