"""Reptile: move towards the weights that each task ends with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from modicum.meta.inner import Params, detached, gradient_steps, loss_of, output, own_params
from modicum.meta.learner import GradientLearner, Rule
from modicum.meta.maml import InnerRate, Steps


class Reptile(Rule):
    """Inner rule: `steps` gradient steps of size `rate` on a task, from w, to w_K.
    Outer rule: w <- w + eps mean_tasks(w_K - w), eps the outer rate; no gradient of a gradient.

    In meta-training the inner rule sees support and query, shuffled and dealt out in mini-batches,
    another one in each step, so that all steps together pass over them `passes` times: a step on
    one mini-batch is to help on the next.  `passes` = `steps` shows each step all of them.  A task
    is judged by `judged` steps on its whole support set.  With eps = 1 and one process it is FedAvg
    over tasks.

    Nichol et al., 2018 (arXiv 1803.02999).
    """

    OUTER: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd", "momentum": 0.0, "rate": 1.0, "warmup": 0, "warmup_rate": 0.0,
        "final_rate": 0.0, "tasks": 4,
    }  # fmt: skip

    kind: Literal["reptile"] = "reptile"
    steps: Annotated[int, Field(ge=1)] = 5
    rate: InnerRate = 0.1
    passes: Annotated[int, Field(ge=1)] = 1
    judged: Steps = 20
    norms: Literal["batch", "frozen"] = "batch"  # the inner rule moves all, per-step ones are not

    def learner(self, net: nn.Module) -> ReptileLearner:
        return ReptileLearner(self, net)


class ReptileLearner(GradientLearner):
    def __init__(self, rule: Reptile, net: nn.Module) -> None:
        super().__init__(net, rule.norms, rule.steps, rule.judged)
        self.rule = rule

    @property
    def moved(self) -> set[str]:
        return {name for name, p in self.net.named_parameters() if p.requires_grad}

    def step_size(self, name: str, step: int) -> float:
        return self.rule.rate

    def adapt(self, xs: Tensor, ys: Tensor, steps: int) -> list[Params]:
        still = detached(own_params(self.net))
        return list(
            gradient_steps(self.net, still, self.moved, (xs, ys), steps, self.step_size, False)
        )

    def trained(self, x: Tensor, y: Tensor) -> Params:
        """The weights after one step on each mini-batch in turn."""
        params, parts = detached(own_params(self.net)), max(1, self.steps // self.rule.passes)
        for k in range(self.steps):
            rows = mini_batch(len(x), parts, k)
            part = x[rows], y[rows]
            (params,) = gradient_steps(self.net, params, self.moved, part, 1, self.step_size, False)
        return params

    def task(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        """In training a loss whose gradient is w - w_K, with the value of the queries' loss."""
        if not self.training:
            return super().task(xs, ys, xq, yq)
        last = self.trained(torch.cat([xs, xq]), torch.cat([ys, yq]))
        with torch.no_grad():
            out = output(self.net, last, xq, self.steps)
            value = loss_of(out, yq)
        pulls = [(w * (w - last[n]).detach()).sum() for n, w in own_params(self.net).items()]
        pull = torch.stack(pulls).sum()
        return value + pull - pull.detach(), out


def mini_batch(n: int, parts: int, step: int) -> Tensor:
    """The rows of n samples that a step sees: one of so many parts, in turn, in an order that is
    the same for every task; samples are drawn at random already."""
    order = np.random.default_rng(n).permutation(n)  # torch's would differ by task under vmap
    parts = min(parts, n)
    return torch.from_numpy(order[step % parts :: parts].copy())
