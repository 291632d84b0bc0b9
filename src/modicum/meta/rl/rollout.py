"""Episodes of a policy: sampled for many tasks at once, each with parameters of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from modicum.meta.inner import Params
from modicum.meta.rl.advantages import advantages
from modicum.meta.rl.environments import Array, Environment, Rng
from modicum.meta.rl.gaussian import Gaussian, log_std_of


class Batch(NamedTuple):
    """The steps of all episodes of t tasks, or of one without the first dimension.

    observations (t, n, o), actions (t, n, a), advantages (t, n), and the log probabilities (t, n)
    of the actions when they were taken.
    """

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    log_probs: Tensor


@torch.no_grad()
def sample(
    environment: Environment, policy: nn.Module, params: Params, tasks: Array, episodes: int,
    discount: float, decay: float, rng: Rng,
) -> tuple[Batch, Array]:  # fmt: skip
    """`episodes` episodes of each of t tasks, and their returns (t, episodes).

    `params` have a first dimension of t: those of the policy in each task.
    """
    t, h = len(tasks), environment.horizon
    means = vmap(lambda p, x: functional_call(policy, p, (x,)))
    log_std = vmap(lambda p: log_std_of(policy, p))(params)[:, None]
    like = log_std.new_empty
    seen = like(t, episodes, h, environment.observations)
    acted = like(t, episodes, h, environment.actions)
    log_probs, rewards = like(t, episodes, h), like(t, episodes, h)
    now = environment.start(np.repeat(tasks, episodes, axis=0), rng)
    for k in range(h):
        seen[:, :, k] = torch.from_numpy(now).view(t, episodes, -1)
        dist = Gaussian(means(params, seen[:, :, k]), log_std)
        noise = rng.standard_normal(dist.mean.shape, dtype=np.float32)
        acted[:, :, k] = dist.mean + log_std.exp() * torch.from_numpy(noise).to(log_std.device)
        log_probs[:, :, k] = dist.log_prob(acted[:, :, k])
        now, reward = environment.step(acted[:, :, k].flatten(0, 1).double().cpu().numpy())
        rewards[:, :, k] = torch.from_numpy(reward).view(t, episodes)
    made = Batch(
        seen.flatten(1, 2), acted.flatten(1, 2),
        advantages(seen, rewards, discount, decay).flatten(1), log_probs.flatten(1),
    )  # fmt: skip
    return made, rewards.double().sum(-1).cpu().numpy()
