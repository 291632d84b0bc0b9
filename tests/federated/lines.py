"""A population and a net small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

import modicum as mo
from modicum.federated.layout import Layout, Part


class Lines:
    """Regression of y = a x0 + b x1, a line per client, not far from one another."""

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
        slope = (2, -1) + 0.3 * np.random.default_rng([5, i]).normal(size=2)
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


class LineLearner:
    """y = w x + b by hand, in float32: what a federation needs of a learner, at no cost.

    All is shared, or, where the rule has a local part, b is the client's.  `IDLE` more weights
    are shared and never move.
    """

    IDLE = 40

    def __init__(self, rule, deploys=False):
        self.rule, self.deploys = rule, deploys
        n = self.IDLE
        part, idle = Part("w", (2,), "flat", 0, 0), Part("idle", (n,), "flat", 2, 1)
        rest = Part("b", (1,), "flat", 2 + n, 2)
        local = (rest,) if rule.local else ()
        parts = (part, idle) if rule.local else (part, idle, rest)
        self.layout = Layout(parts, local, b"lines" + bytes([len(local)] * 11))
        self.begin(np.zeros(self.layout.size, np.float32))

    def begin(self, shared):
        n = self.IDLE
        b = np.zeros(1, np.float32) if self.rule.local else shared[2 + n :]
        self.w, self.idle = np.concatenate([shared[:2], b]), shared[2 : 2 + n]
        self.updates, self.waiting = 0, []

    def learn(self, x, target):
        error = self.predict(x)[0] - target[0]
        self.waiting.append(2 * error * np.append(x, np.float32(1)))
        if len(self.waiting) == self.rule.batch:
            self.w = self.w - self.rates() * np.mean(self.waiting, 0, dtype=np.float32)
            self.updates, self.waiting = self.updates + 1, []
        return float(error**2)

    def rates(self):
        rule = self.rule
        if not rule.local:
            return np.float32(rule.rate)
        first = (rule.reconstruct * 4 if self.deploys else rule.support) // rule.batch
        if self.updates < first:
            return np.array([0, 0, rule.rate_local], np.float32)
        return np.array([rule.rate, rule.rate, self.deploys * rule.rate_local], np.float32)

    def predict(self, x):
        return np.array([self.w[:2] @ x + self.w[2]], np.float32)

    def shared(self):
        b = self.w[2:] if not self.rule.local else self.w[:0]
        return np.concatenate([self.w[:2], self.idle, b]).astype(np.float32)
