"""A population and a net small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

import modicum as mo


class Lines:
    """Regression of y = a x0 + b x1, a line per client; newcomers come after the clients."""

    loss = "mse"

    def __init__(self, clients=6, newcomers=2):
        self.clients, self.newcomers = clients, newcomers

    def streams(self, client, support, query, rng):
        if client >= self.clients:
            raise mo.InvalidInput(f"client {client} takes no part")
        return self._draw(client, support, rng), self._draw(client, query, rng)

    def newcomer(self, which, shots, query, rng):
        i = self.clients + which
        return list(self._draw(i, shots, rng)), list(self._draw(i, query, rng))

    def _draw(self, i, n, rng) -> Iterator:
        slope = np.random.default_rng([5, i]).normal(size=2)
        own = np.random.default_rng(rng.integers(1 << 62))

        def points():
            for _ in range(n):
                x = own.normal(size=2).astype(np.float32)
                yield x, np.array([slope @ x], np.float32)

        return points()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net()
