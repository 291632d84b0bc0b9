"""Meta-reinforcement learning: policies that a few policy-gradient steps adapt to a task."""

from __future__ import annotations

from modicum.meta.rl.cheetah import HalfCheetahDirection, HalfCheetahVelocity
from modicum.meta.rl.environments import Environment, Navigation2D
from modicum.meta.rl.train import RL, held_tasks, metatrain_rl, returns, step_costs
from modicum.meta.rl.trpo import TRPO

ENVIRONMENTS: dict[str, type[Environment]] = {
    e.name: e for e in (Navigation2D, HalfCheetahDirection, HalfCheetahVelocity)
}

__all__ = [
    "ENVIRONMENTS",
    "RL",
    "TRPO",
    "Environment",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "Navigation2D",
    "held_tasks",
    "metatrain_rl",
    "returns",
    "step_costs",
]
