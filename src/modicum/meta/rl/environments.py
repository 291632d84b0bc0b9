"""Environments of meta-reinforcement learning: many episodes of many tasks, stepped at once."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


class Environment:
    """Episodes of `horizon` steps each, none of which ends before.

    A task is a vector of floats.  All that is random comes from the generators that are given, so
    that the same ones make the same episodes.
    """

    name: ClassVar[str]
    observations: ClassVar[int]
    actions: ClassVar[int]

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon

    def draw(self, n: int, rng: Rng) -> Array:
        """n tasks: (n, d)."""
        raise NotImplementedError

    def start(self, tasks: Array, rng: Rng) -> Array:
        """Begin an episode of each task (m, d): their observations (m, observations)."""
        raise NotImplementedError

    def step(self, actions: Array) -> tuple[Array, Array]:
        """Observations (m, observations) and rewards (m,) that actions (m, actions) lead to."""
        raise NotImplementedError


class Navigation2D(Environment):
    """A point goes to a goal that it does not see: s' = s + clip(a, -0.1, 0.1), r = -|s' - g|^2.

    It starts at the origin, goals g are uniform in [-0.5, 0.5]^2; the observation is s.  Finn et
    al., ICML 2017 (arXiv 1703.03400), whose episodes end within 0.01 of the goal: these go on.
    """

    name = "navigation"
    observations = actions = 2
    REACH: ClassVar[float] = 0.1

    def __init__(self, horizon: int = 100) -> None:
        super().__init__(horizon)

    def draw(self, n: int, rng: Rng) -> Array:
        return rng.uniform(-0.5, 0.5, (n, 2))

    def start(self, tasks: Array, rng: Rng) -> Array:
        self.goals = tasks
        self.at = np.zeros_like(tasks)
        return self.at

    def step(self, actions: Array) -> tuple[Array, Array]:
        self.at = self.at + actions.clip(-self.REACH, self.REACH)
        return self.at, -((self.at - self.goals) ** 2).sum(1)

    def best_returns(self, tasks: Array) -> Array:
        """The return of who knows the goal and goes straight to it, for each task."""
        self.start(tasks, np.random.default_rng(0))
        return np.sum([self.step(self.goals - self.at)[1] for _ in range(self.horizon)], axis=0)
