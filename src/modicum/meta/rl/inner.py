"""The inner loop of meta-reinforcement learning: policy-gradient steps as functions of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from modicum.meta.inner import Loss, Params, output, own_params
from modicum.meta.learner import GradientLearner
from modicum.meta.rl.gaussian import Gaussian, log_std_of
from modicum.meta.rl.rollout import Batch


def surrogate(policy: Gaussian, batch: Batch) -> Tensor:
    """-mean(pi(a|s) / pi_then(a|s) A), which falls as the return rises.

    At the policy that has sampled, its gradient is REINFORCE's, -mean(A grad log pi(a|s)), and its
    Hessian knows how the samples depend on the policy (LVC; Rothfuss et al., ICLR 2019, arXiv
    1810.06784).
    """
    ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
    return -(ratio * batch.advantages).mean()


def loss_on(learner: GradientLearner, batch: Batch) -> Loss:
    """The loss of an inner step on the episodes of a task."""

    def loss(mean: Tensor, params: Params) -> Tensor:
        return surrogate(Gaussian(mean, log_std_of(learner.net, params)), batch)

    return loss


def step(learner: GradientLearner, params: Params, batch: Batch, k: int) -> Params:
    """The parameters of a task's policy after inner step k."""
    return learner.step(params, batch.observations, loss_on(learner, batch), k)


@torch.no_grad()
def steps(learner: GradientLearner, params: Params, batch: Batch, k: int) -> Params:
    """`step` for many tasks at once, without a graph: params and batch have a first dimension."""
    return vmap(lambda p, b: step(learner, p, b, k))(params, batch)


def start(learner: GradientLearner, tasks: int) -> Params:
    """The learner's own parameters, once for each task."""
    return {n: w.detach().expand(tasks, *w.shape) for n, w in own_params(learner.net).items()}


def adapted(learner: GradientLearner, batches: Sequence[Batch], x: Tensor) -> Gaussian:
    """What the adapted policies of t tasks do at x (t, n, o): a differentiable function of what
    the outer rule moves, through the inner steps on `batches`."""

    def one(batches: Sequence[Batch], x: Tensor) -> Gaussian:
        params = own_params(learner.net)
        for k, batch in enumerate(batches):
            params = step(learner, params, batch, k)
        mean = output(learner.net, params, x, len(batches))
        return Gaussian(mean, log_std_of(learner.net, params)[None])

    return vmap(one)(tuple(batches), x)
