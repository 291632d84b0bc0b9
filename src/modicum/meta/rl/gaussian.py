"""Diagonal Gaussians of actions, as plain functions of tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from modicum.errors import UsageError
from modicum.meta.inner import Params


class Gaussian(NamedTuple):
    """N(mean, exp(log_std)^2), independent in the last dimension; log_std broadcasts to mean."""

    mean: Tensor
    log_std: Tensor

    def log_prob(self, actions: Tensor) -> Tensor:
        """(..., a) -> (...)."""
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl_to(self, other: Gaussian) -> Tensor:
        """KL(self || other): (...)."""
        var, about = (2 * self.log_std).exp(), (self.mean - other.mean) ** 2
        each = (var + about) * (-2 * other.log_std).exp() / 2 + other.log_std - self.log_std
        return (each - 0.5).sum(-1)

    def snapshot(self) -> Gaussian:
        """What it is now, whatever becomes of the parameters that it was made of."""
        return Gaussian(self.mean.detach().clone(), self.log_std.detach().clone())


def log_std_of(policy: nn.Module, params: Params) -> Tensor:
    """The log deviations (a,) of a GaussianPolicy with these parameters."""
    return params["log_std"].clamp(min=float(policy.least))


def check_policy(policy: nn.Module, observations: int, actions: int) -> None:
    """Raise UsageError for a net that is no policy of these sizes."""
    layers = [m for m in policy.modules() if isinstance(m, nn.Linear)]
    if not isinstance(getattr(policy, "log_std", None), nn.Parameter) or not layers:
        raise UsageError(
            "the net is no policy: it has no log_std", hint="modicum.models.GaussianPolicy"
        )
    found = layers[0].in_features, layers[-1].out_features
    if found != (observations, actions):
        raise UsageError(
            f"the policy takes {found[0]} observations and makes {found[1]} actions",
            why=f"the environment has {observations} and {actions}",
        )
