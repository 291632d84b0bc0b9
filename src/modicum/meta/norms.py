"""What batch norms do in an inner loop, said aloud: three settings, and none by accident.

A batch norm that follows its statistics by itself would move them in every inner step of every
task, and use others before and after.  So a net that is meta-trained has its norms replaced by
`MetaNorm`, which never moves anything by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modicum.errors import UsageError
from modicum.meta.batch_norm import batch_norm

Norms = Literal["batch", "frozen", "per-step"]
"""The statistics by which batch norms normalise.

- "batch": those of the samples that pass together: the support set in an inner step, all queries
  of a task when it is judged (transductive), as MAML does.
- "frozen": running ones, the same in all steps, as on a device that sees one sample at a time.
- "per-step": as "batch", with a scale and a shift for each inner step and one for the queries,
  which the inner rule does not move (MAML++, arXiv 1810.09502, whose released code judges by the
  statistics of the batch too).

In each of them running statistics follow the queries after each update of the outer rule, before
adaptation, and no others ever.
"""


class MetaNorm(nn.Module):
    """A batch norm of a setting; parameters and buffers have the names of the one it stands for.

    With "per-step" scale and shift have a first dimension of steps + 1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm, setting: Norms, steps: int) -> None:
        super().__init__()
        mean, var = norm.running_mean, norm.running_var
        if (mean is None or var is None) and setting == "frozen":
            raise UsageError(
                "a batch norm without running statistics cannot be frozen",
                hint="track_running_stats=True, or norms=batch",
            )
        self.setting, self.eps = setting, norm.eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        self.step, self.following, self.together = 0, False, False
        for name in ("weight", "bias"):
            value = getattr(norm, name)
            if value is not None:
                value = value.detach().clone()
                value = value.repeat(steps + 1, 1) if setting == "per-step" else value
                value = nn.Parameter(value)
            self.register_parameter(name, value)
        self.register_buffer("running_mean", None if mean is None else mean.clone())
        self.register_buffer("running_var", None if var is None else var.clone())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._now(self.weight), self._now(self.bias)
        mean, var = self.running_mean, self.running_var
        if self.following and mean is not None:
            F.batch_norm(x.detach(), mean, var, None, None, True, self.momentum, self.eps)
        if self.setting == "frozen":
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if weight is None or bias is None or x.numel() == x.shape[1]:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if self.together:
            # apart, since PyTorch 2.13's second derivatives of batch_norm are wrong where vmap
            # gives each task a weight of its own
            y = F.batch_norm(x, None, None, None, None, True, 0.0, self.eps)
            shape = (1, -1, *[1] * (x.dim() - 2))
            return y * weight.reshape(shape) + bias.reshape(shape)
        if transformed(x):
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return batch_norm(x, weight, bias, self.eps)

    def _now(self, value: Tensor | None) -> Tensor | None:
        if value is None or self.setting != "per-step":
            return value
        return value[min(self.step, len(value) - 1)]


def transformed(x: Tensor) -> bool:
    """Whether x is inside of a transform of torch.func, such as vmap."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def with_norms(net: nn.Module, setting: Norms, steps: int) -> nn.Module:
    """A copy of a net with every batch norm replaced."""
    made = copy.deepcopy(net)
    for name, module in list(made.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, _BatchNorm):
            setattr(made.get_submodule(parent), leaf, MetaNorm(module, setting, steps))
    return made


def norms_of(net: nn.Module) -> list[MetaNorm]:
    return [m for m in net.modules() if isinstance(m, MetaNorm)]


@contextmanager
def following(net: nn.Module) -> Iterator[None]:
    """Running statistics follow the batches that pass."""
    norms = norms_of(net)
    for norm in norms:
        norm.following = True
    try:
        yield
    finally:
        for norm in norms:
            norm.following = False


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict for the net without `MetaNorm`; of per-step norms the entries of step 0."""
    state = dict(net.state_dict())
    for name, module in net.named_modules():
        if isinstance(module, MetaNorm) and module.setting == "per-step":
            for leaf in ("weight", "bias"):
                if f"{name}.{leaf}" in state:
                    state[f"{name}.{leaf}"] = state[f"{name}.{leaf}"][0]
    return state
