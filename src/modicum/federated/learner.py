"""A client's local training: what PyTorch, the emitted C and a board on a wire have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modicum.federated.layout import Layout
from modicum.native import Native
from modicum.plan import Plan
from modicum.state import image_to_c

Array = NDArray[np.float32]


class Learner(Protocol):
    """One net under one plan, which takes samples one by one and keeps none of them.

    A task begins with shared weights from elsewhere: the others are then as they were when the
    learner was made, the optimiser's state is 0, and the next update is the first inner step.
    Samples are as PyTorch has them, without a batch dimension: images (channels, height, width).
    """

    layout: Layout

    def begin(self, shared: Array) -> None:
        """Start a task from the shared weights (layout.size,)."""

    def learn(self, x: Array, target: Any) -> float:
        """One sample forward and backward; an update after every `plan.accumulate` of them.

        Returns the loss before the update.  `target` is a label, or for mse the target values.
        """

    def predict(self, x: Array) -> Array:
        """The outputs for one sample (outputs,)."""

    def shared(self) -> Array:
        """The shared weights as they are now (layout.size,)."""


class NativeLearner:
    """Trains in the emitted C of a plan, as a shared library in this process.

    `folder` is what `emit(model, plan, folder)` wrote.  With `parity` the bits are those of the
    boards; without it the library is built for this machine's speed.
    """

    def __init__(self, folder: str | Path, local: tuple[str, ...] = (), parity: bool = False):
        self.plan = Plan.load(Path(folder) / "plan.json")
        self.layout = Layout.of(self.plan, local)
        self.net = Native(folder, parity)

    def begin(self, shared: Array) -> None:
        self.net.reset()
        for index, values in self.layout.to_c(shared).items():
            self.net.set_trained(index, values)

    def learn(self, x: Array, target: Any) -> float:
        return self.net.train(image_to_c(x[None]), target)

    def predict(self, x: Array) -> Array:
        return self.net.predict(image_to_c(x[None]))

    def shared(self) -> Array:
        return self.layout.from_c(dict(enumerate(self.net.trained())))
