"""A client that trains in PyTorch, exactly as its plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from modicum.adapt import sample_losses, torch_optimizer, update
from modicum.apply import apply
from modicum.errors import ModicumError
from modicum.federated.layout import Layout
from modicum.plan import Plan

Array = NDArray[np.float32]


class TorchLearner:
    """See `Learner`.  The local weights of every task start as they are in `model`."""

    def __init__(self, model: nn.Module, plan: Plan, local: Sequence[str] = ()) -> None:
        self.plan = plan
        self.layout = Layout.of(plan, local)
        self.tuned = apply(model, plan)
        self._start = {name: p.detach().clone() for name, p in self.tuned.trained.items()}
        self.begin(self.shared())

    def begin(self, shared: Array) -> None:
        given = self.layout.split(shared)
        with torch.no_grad():
            for name, p in self.tuned.trained.items():
                p.copy_(torch.from_numpy(given[name]) if name in given else self._start[name])
        self.tuned.inner_step, self._waiting = 0, 0
        self._optimizer = torch_optimizer(self.plan.optimizer, self.tuned, self.plan)
        self._optimizer.zero_grad(set_to_none=True)

    def learn(self, x: Array, target: Any) -> float:
        self.tuned.train()
        y = torch.from_numpy(np.asarray(target)[None])
        loss = sample_losses(self.plan, self.tuned(torch.from_numpy(x[None])), y)
        if not bool(torch.isfinite(loss).all()):
            raise ModicumError("the loss is not finite", hint="a smaller learning rate")
        (loss.sum() / self.plan.accumulate).backward()
        self._waiting += 1
        if self._waiting == self.plan.accumulate:
            update(self._optimizer, self.tuned)
            self._waiting = 0
        return float(loss.detach())

    def predict(self, x: Array) -> Array:
        self.tuned.eval()
        with torch.no_grad():
            y = self.tuned(torch.from_numpy(x[None]))
        return np.asarray(y.numpy()[0], np.float32)

    def shared(self) -> Array:
        return self.layout.join({k: p.detach().numpy() for k, p in self.tuned.trained.items()})
