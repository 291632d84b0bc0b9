"""What a client does in a round, whatever carries the messages and whatever trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, UsageError
from modicum.federated.codec import Message, decode, encode, largest
from modicum.federated.learner import Learner
from modicum.federated.rules import FederatedRule

Array = NDArray[np.float32]
Sample = tuple[Array, Any]


@dataclass(frozen=True)
class Kept:
    """What a client keeps between rounds where its rule asks for it, and nothing else.

    `shared` are the weights that it was last sent, in `round`: with `downlink="changed"` only what
    changed since then has to come.  `unsent` is the part of its changes that the largest ones left
    out (`feedback`).
    """

    shared: Array | None = None
    round: int = 0
    unsent: Array | None = None


@dataclass(frozen=True)
class Learned:
    """What came of a client's round.  `upload` is all that leaves it, beside these numbers."""

    upload: bytes
    loss: float
    samples: int
    kept: Kept


def take_part(
    learner: Learner,
    rule: FederatedRule,
    download: bytes,
    support: Iterator[Sample],
    query: Iterator[Sample],
    kept: Kept | None = None,
) -> Learned:
    """A client's round: reconstruct the local part, learn the shared one, encode what changed.

    With one pass over the query samples each sample is learned from once and forgotten; with
    several they are held, as the rule says.  Raises InvalidInput for a download that is not one,
    or builds on weights that this client does not have, and UsageError where samples are too few.
    """
    layout, kept = learner.layout, kept or Kept()
    message = decode(download, model=layout.model, size=layout.size, kind="weights")
    shared = _received(message, kept)
    learner.begin(shared)
    learn_all(learner, support, rule.support)
    once = islice(query, rule.query)
    samples: Iterable[Sample] = once if rule.passes == 1 else list(once)
    losses = []
    for _ in range(rule.passes):
        losses.append(learn_all(learner, samples, rule.query))
    change = layout.check(learner.shared() - shared)
    if rule.feedback and kept.unsent is not None:
        change = change + kept.unsent
    where = largest(change, rule.top)
    values = change if where is None else change[where]
    reply = Message("delta", layout.model, message.round, layout.size, values, where, message.round)
    upload = encode(reply, rule.values)
    after = Kept(shared, message.round) if rule.downlink == "changed" else Kept()
    if rule.feedback:
        sent = decode(upload, model=layout.model, size=layout.size, kind="delta").dense()
        after = replace(after, unsent=change - sent)
    return Learned(upload, losses[-1], rule.query, after)


def learn_all(learner: Learner, samples: Iterable[Sample], count: int) -> float:
    """Learn from `count` samples in turn; returns their mean loss, nan of none."""
    total, seen = 0.0, 0
    for x, target in islice(samples, count):
        total += learner.learn(x, target)
        seen += 1
    if seen < count:
        raise UsageError(
            f"a client has {seen} samples where its rule takes {count}",
            hint="a smaller support or query, or clients with more samples",
        )
    return total / seen if seen else math.nan


@dataclass(frozen=True)
class Judged:
    """How a new client does: mean squared error or accuracy, before and after its few samples."""

    before: float
    after: float
    tests: int


def settle(
    learner: Learner,
    rule: FederatedRule,
    shared: Array,
    shots: Sequence[Sample],
    tests: Sequence[Sample],
) -> Judged:
    """A new client learns from its few samples, by the plan of `rule.deployment`, and is tested.

    The local part is reconstructed in `rule.reconstruct` passes over the shots, then all that is
    trained is tuned in `rule.tune` passes; the last update begins another pass where it needs to.
    """
    learner.begin(shared)
    before = judge(learner, tests)
    passes = rule.reconstruct + rule.tune
    updates = math.ceil(passes * len(shots) / rule.batch)
    learn_all(learner, cycle(shots), updates * rule.batch)
    return Judged(before, judge(learner, tests), len(tests))


def judge(learner: Learner, tests: Sequence[Sample]) -> float:
    """Mean squared error where targets are numbers, otherwise accuracy."""
    if not tests:
        raise UsageError("there is nothing to test a client on")
    scores = []
    for x, target in tests:
        out = learner.predict(x)
        if isinstance(target, np.ndarray):
            scores.append(float(np.mean((out - target.ravel()) ** 2)))
        else:
            scores.append(float(int(out.argmax()) == int(target)))
    return float(np.mean(scores))


def _received(message: Message, kept: Kept) -> Array:
    """The shared weights that a download stands for."""
    if message.where is None:
        return message.values
    if kept.shared is None or kept.round != message.base:
        have = "none" if kept.shared is None else f"those of round {kept.round}"
        raise InvalidInput(
            f"the download changes the weights of round {message.base}",
            why=f"this client has {have}",
            hint="the server sends all of them to a client whose round failed",
        )
    return message.laid_over(kept.shared)
