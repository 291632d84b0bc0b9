"""HalfCheetah tasks on gymnasium's MuJoCo environment; the only module that imports gymnasium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from modicum.errors import ToolMissing
from modicum.meta.rl.environments import Array, Environment, Rng

CONTROL = 0.05
"""Cost of a squared action: 0.5 x 0.1 in the experiments of MAML."""

_X, _SEEN = 1, slice(2, 19)
"""In a simulator's state, which begins with the time, 9 positions and 9 velocities: the position
along x, and what gymnasium shows of it, all but that."""


class HalfCheetah(Environment):
    """HalfCheetah-v5 with rewards of `reward`, for one goal per episode.

    One simulator steps all episodes in turn: the state of each, with what its solver starts from,
    is put in before its step and taken out after it.  Actions are clipped to [-1, 1].
    """

    observations, actions = 17, 6

    def __init__(self, horizon: int = 200) -> None:
        super().__init__(horizon)

    def reward(self, velocity: Array, goals: Array) -> Array:
        """What a forward velocity (m,) is worth for each goal (m,)."""
        raise NotImplementedError

    def start(self, tasks: Array, rng: Rng) -> Array:
        self.goals = tasks[:, 0]
        self.states = np.empty((len(tasks), self.simulator.size))
        seeds = rng.integers(0, 1 << 31, len(tasks))
        for state, seed in zip(self.states, seeds.tolist(), strict=True):
            self.simulator.start(seed, state)
        return self.states[:, _SEEN].copy()

    def step(self, actions: Array) -> tuple[Array, Array]:
        actions, before = actions.clip(-1, 1), self.states[:, _X].copy()
        for state, action in zip(self.states, actions, strict=True):
            self.simulator.step(action, state)
        velocity = (self.states[:, _X] - before) / self.simulator.env.dt
        reward = self.reward(velocity, self.goals) - CONTROL * (actions**2).sum(1)
        return self.states[:, _SEEN].copy(), reward

    @cached_property
    def simulator(self) -> _Simulator:
        return _Simulator()

    def __getstate__(self) -> dict[str, Any]:
        return {"horizon": self.horizon}


class HalfCheetahDirection(HalfCheetah):
    """Run forwards or backwards: r = direction x velocity - 0.05 |a|^2, direction -1 or 1.

    The velocity is that along x over a step of 0.05 s.  Finn et al., ICML 2017 (arXiv 1703.03400).
    """

    name = "cheetah-direction"

    def draw(self, n: int, rng: Rng) -> Array:
        """As many of each direction, in turn; of an odd number the last one is drawn."""
        first = rng.choice([-1.0, 1.0])
        return first * (-1.0) ** np.arange(n)[:, None]

    def reward(self, velocity: Array, goals: Array) -> Array:
        return goals * velocity


class HalfCheetahVelocity(HalfCheetah):
    """Run at a speed: r = -|velocity - goal| - 0.05 |a|^2, goals uniform in [0, 2].

    The velocity is that along x over a step of 0.05 s.  Finn et al., ICML 2017 (arXiv 1703.03400).
    """

    name = "cheetah-velocity"

    def draw(self, n: int, rng: Rng) -> Array:
        return rng.uniform(0, 2, (n, 1))

    def reward(self, velocity: Array, goals: Array) -> Array:
        return -abs(velocity - goals)


class _Simulator:
    """gymnasium's HalfCheetah, whose state is kept outside.

    Raises ToolMissing without gymnasium or MuJoCo.
    """

    def __init__(self) -> None:
        try:
            import gymnasium
            import mujoco
        except ImportError as error:
            raise ToolMissing(
                "HalfCheetah needs gymnasium and MuJoCo",
                why=str(error),
                hint="pip install 'modicum[rl]'; navigation needs neither",
            ) from None
        self.mujoco: Any = mujoco
        with _quiet(mujoco):
            self.env: Any = gymnasium.make("HalfCheetah-v5", disable_env_checker=True).unwrapped
        states = mujoco.mjtState
        self.kind = states.mjSTATE_FULLPHYSICS | states.mjSTATE_WARMSTART
        self.size = int(mujoco.mj_stateSize(self.env.model, self.kind))

    def start(self, seed: int, state: Array) -> None:
        """The state that an episode begins with is written into `state`."""
        self.env.reset(seed=seed)
        self.mujoco.mj_getState(self.env.model, self.env.data, state, self.kind)

    def step(self, action: Array, state: Array) -> None:
        """Move `state` by one step of the environment, without what gymnasium computes beside."""
        model, data = self.env.model, self.env.data
        self.mujoco.mj_setState(model, data, state, self.kind)
        data.ctrl[:] = action
        self.mujoco.mj_step(model, data, nstep=self.env.frame_skip)
        self.mujoco.mj_getState(model, data, state, self.kind)


@contextmanager
def _quiet(mujoco: Any) -> Iterator[None]:
    """Without the warnings that gymnasium's own model file causes: they would go to stderr and to
    a file in the working folder."""
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
