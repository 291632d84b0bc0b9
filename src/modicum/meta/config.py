"""How a meta-training goes, and what came of it: plain data."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modicum.graph import Frozen
from modicum.meta.protonet import ProtoNet
from modicum.meta.rules import RULES, AnyRule
from modicum.tasks import Augment, FixedEpisodes
from modicum.units import duration, percent

Rate = Annotated[float, Field(ge=0, lt=float("inf"))]


class Scores(Frozen):
    """Mean over tasks and half of its 95 % interval: accuracies, or losses of regression."""

    tasks: int
    mean: float
    interval: float
    labels: bool

    def __str__(self) -> str:
        if self.labels:
            return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f} % of {self.tasks} tasks"
        return f"loss {self.mean:.4f} ± {self.interval:.4f} of {self.tasks} tasks"


class MetaTrain(Frozen):
    """How long, how fast, on what tasks, by which rule.

    `epochs` of `episodes` tasks each, `tasks` of which make one update (per process), `together`
    of them computed at once (vmap: faster for small nets, and takes as much more memory).  The
    outer rate rises linearly from `warmup_rate` to `rate` over `warmup` epochs, then falls as a
    cosine to `final_rate`.  `optimizer`: SGD with `momentum`, or Adam.  After every epoch the mean
    score over `validation` tasks of other classes is taken, if there are such, and the best
    weights are kept.  What is not given has the default of the rule (``Rule.OUTER``); those of
    ProtoNet, shown here, are those of P>M>F and TinyTrain, which start from ImageNet weights.
    """

    epochs: Annotated[int, Field(ge=1)] = 100
    episodes: Annotated[int, Field(ge=1)] = 2000
    tasks: Annotated[int, Field(ge=1)] = 1
    together: Annotated[int, Field(ge=1)] = 1
    rule: AnyRule = ProtoNet()
    optimizer: Literal["sgd", "adam"] = "sgd"
    episode: FixedEpisodes = FixedEpisodes(ways=5, shots=5, queries=15)
    augment: Augment | None = None
    rate: Rate = 5e-5
    warmup_rate: Rate = 1e-6
    final_rate: Rate = 1e-6
    warmup: Annotated[float, Field(ge=0)] = 5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    validation: Annotated[int, Field(ge=1)] = 100
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_rule(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        rule = given.get("rule")
        kind = rule.get("kind") if isinstance(rule, dict) else getattr(rule, "kind", None)
        return {**(RULES[kind].OUTER if kind in RULES else {}), **given}

    @model_validator(mode="after")
    def _long_enough(self) -> MetaTrain:
        if self.warmup >= self.epochs and self.warmup:
            raise ValueError(f"{self.warmup} epochs of warm-up do not fit in {self.epochs}")
        if self.episodes % self.tasks:
            raise ValueError(f"{self.episodes} episodes are not whole updates of {self.tasks}")
        if self.tasks % self.together:
            raise ValueError(f"{self.tasks} tasks of an update are not whole {self.together}s")
        return self

    @property
    def updates(self) -> int:
        """In all."""
        return self.epochs * self.episodes // self.tasks

    def rate_at(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        ramp = round(self.warmup * self.episodes / self.tasks)
        if update < ramp:
            return self.warmup_rate + (self.rate - self.warmup_rate) * update / ramp
        share = (update - ramp) / max(1, self.updates - ramp)
        return self.final_rate + (self.rate - self.final_rate) * (1 + math.cos(math.pi * share)) / 2


class MetaTrace(Frozen):
    """What came of it, one entry per epoch; `best` is the epoch whose weights were kept.

    Scores are accuracies of classification, and losses of regression.
    """

    losses: tuple[float, ...]
    accuracies: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    best: int
    seconds: float
    test: Scores | None = None

    def __str__(self) -> str:
        text = f"{len(self.losses)} epochs in {duration(self.seconds)}, "
        text += f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}"
        if self.validation and self.accuracies:
            held = percent(self.validation[self.best])
            text += f"; kept: epoch {self.best + 1}, validation accuracy {held}"
        elif self.validation:
            text += f"; kept: epoch {self.best + 1}, loss {self.validation[self.best]:.3f}"
        if self.test is not None:
            text += f"; {self.test}"
        return text
