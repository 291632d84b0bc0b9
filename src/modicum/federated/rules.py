"""Federated methods: what a client learns from its samples, what it sends, what the server does.

All are one rule with other values (Ren et al., TinyReptile and TinyMetaFed, 2023; Singhal et al.,
FedRecon, NeurIPS 2021; McMahan et al., FedAvg, AISTATS 2017; Nichol et al., Reptile, 2018):

    client  l <- l - rate_local dL/dl   over `support` samples, g fixed      (where a part is local)
            g <- g - rate dL/dg         over `query` others, l fixed
    up      the share `top` of the entries of delta = g - g_round that are largest
    server  g <- g + eps_t mean(delta)
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator

from modicum.errors import UsageError
from modicum.graph import Frozen, Graph
from modicum.methods import Explicit
from modicum.optim import SGD
from modicum.selection import MOST_STEPS, some

Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
# By name, since a field that a method gives another default has to keep its limits.
Clients = Annotated[int, Field(ge=1, le=100_000)]
Queries = Annotated[int, Field(ge=1, le=1_000_000)]
Passes = Annotated[int, Field(ge=1, le=10_000)]
Batch = Annotated[int, Field(ge=1, le=65535)]
Again = Annotated[int, Field(ge=0, le=10_000)]


class Outer(Frozen):
    """The server's step size eps_t: from `start` in the first round to `end` in the last.

    linear: eps_t = start + (end - start) (t - 1) / T, cosine: half a cosine in its place.
    """

    start: Annotated[float, Field(gt=0, le=10)] = 1.0
    end: Annotated[float, Field(ge=0, le=10)] = 1.0
    schedule: Literal["linear", "cosine"] = "linear"

    def step_size(self, round: int, rounds: int) -> float:
        """eps of a round, counted from 1, of `rounds`."""
        done = (round - 1) / rounds
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


ANNEALED = Outer(start=1.0, end=0.0)


class FederatedRule(Frozen):
    """What all methods have; each has other defaults.

    `train` are patterns of the parameters that clients train, `local` of those among them that
    never leave the client.  A round takes `clients` clients; each sees `support` samples to
    reconstruct its local part, and `query` others to update the shared part, `passes` times, with
    an update after every `batch`.  With one pass no sample is kept.  A new client learns from its
    few samples in `reconstruct` passes over them for its local part, and `tune` passes for all.

    Up: the `top` share of the entries with the largest change, as `values`; with `feedback` a
    client adds what it did not send to its next change (ours).  Down: all, or the entries that
    `changed` since the client was last here, where it keeps what it had; `downlink_top` sends the
    largest of those alone (ours).  `weighting` of the mean: by clients, or by samples.  `clip`: a
    change of a larger norm is scaled down to it.
    """

    kind: str
    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    local: tuple[str, ...] = ()
    clients: Clients = 1
    support: Count = 0
    query: Queries = 32
    passes: Passes = 1
    batch: Batch = 1
    rate: Positive = 0.01
    rate_local: Positive = 0.01
    reconstruct: Again = 0
    tune: Again = 1
    outer: Outer = Outer()
    weighting: Literal["clients", "samples"] = "clients"
    top: Share = 1.0
    values: Literal["float32", "float16", "int8"] = "float32"
    feedback: bool = False
    downlink: Literal["whole", "changed"] = "whole"
    downlink_top: Share = 1.0
    clip: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FederatedRule:
        if bool(self.local) != bool(self.support):
            raise ValueError("`local` parameters and `support` to reconstruct them go together")
        if self.reconstruct and not self.local:
            raise ValueError("there is nothing to reconstruct without `local` parameters")
        if self.support % self.batch or self.query * self.passes % self.batch:
            raise ValueError("support and query are whole batches: samples left over would be lost")
        if self.support // self.batch >= MOST_STEPS:
            raise ValueError(f"at most {MOST_STEPS - 1} updates reconstruct the local part")
        if self.downlink_top < 1 and self.downlink != "changed":
            raise ValueError("`downlink_top` goes with downlink='changed'")
        return self

    def training(self, graph: Graph) -> tuple[Explicit, SGD]:
        """The method and optimiser of the plan that a client of a round trains by.

        The inner steps that `support` makes move the local part alone, all later ones the shared.
        Raises UsageError for patterns that do not match.
        """
        return self._phases(graph, self.support // self.batch, 0.0)

    def deployment(self, graph: Graph, shots: int) -> tuple[Explicit, SGD]:
        """Those of the plan that a new client learns by, from `shots` samples.

        After the local part is reconstructed, all that is trained moves.
        """
        updates = self.reconstruct * shots // self.batch
        if updates >= MOST_STEPS:
            raise UsageError(
                f"{updates} updates to reconstruct the local part are too many",
                hint=f"fewer passes: {MOST_STEPS - 1} updates at most",
            )
        return self._phases(graph, updates, self.rate_local / self.rate)

    def _phases(self, graph: Graph, first: int, later: float) -> tuple[Explicit, SGD]:
        """`first` updates of the local part; then the shared part, and the local one at `later`."""
        names = graph.trainable()
        moved = _matching(names, self.train, "trained")
        local = set(_matching(moved, self.local, "local"))
        relative = self.rate_local / self.rate
        rates = {
            n: (*[relative] * first, later) if n in local else (*[0.0] * first, 1.0) for n in moved
        }
        params = {n: {"rates": r} for n, r in rates.items() if any(r)}
        return Explicit.model_validate({"params": params}), SGD(lr=self.rate)


class FedAvg(FederatedRule):
    """FedAvg, and fine-tuning where a new client learns: several clients, stored samples in
    mini-batches, the mean of what they learned."""

    kind: Literal["fedavg"] = "fedavg"
    clients: Clients = 5
    query: Queries = 32
    passes: Passes = 2
    batch: Batch = 8
    weighting: Literal["clients", "samples"] = "samples"


class Reptile(FederatedRule):
    """Serial Reptile: one client a round, stored samples in mini-batches, an annealed step."""

    kind: Literal["reptile"] = "reptile"
    passes: Passes = 2
    batch: Batch = 8
    outer: Outer = ANNEALED


class TinyReptile(FederatedRule):
    """One client a round, which learns from each sample once and keeps none; an annealed step."""

    kind: Literal["tinyreptile"] = "tinyreptile"
    outer: Outer = ANNEALED


class FedRecon(FederatedRule):
    """Federated reconstruction: the local part is made anew by each client and never sent."""

    kind: Literal["fedrecon"] = "fedrecon"
    clients: Clients = 5
    support: Count = 16
    query: Queries = 16
    passes: Passes = 2
    batch: Batch = 8
    reconstruct: Again = 2
    weighting: Literal["clients", "samples"] = "samples"


class TinyMetaFed(FederatedRule):
    """Partial local reconstruction, the largest changes alone, sample by sample, an annealed step.

    Which parameters are local, and the share that is sent, are this project's choice: the paper's
    are not known to us.
    """

    kind: Literal["tinymetafed"] = "tinymetafed"
    support: Count = 16
    query: Queries = 16
    reconstruct: Again = 1
    top: Share = 0.2
    outer: Outer = ANNEALED
    downlink: Literal["whole", "changed"] = "changed"


AnyRule = Annotated[
    FedAvg | Reptile | TinyReptile | FedRecon | TinyMetaFed, Field(discriminator="kind")
]

FEDERATED: dict[str, type[FederatedRule]] = {
    "fedavg": FedAvg, "reptile": Reptile, "tinyreptile": TinyReptile, "fedrecon": FedRecon,
    "tinymetafed": TinyMetaFed,
}  # fmt: skip
"""The methods by name."""


def _matching(names: list[str], patterns: tuple[str, ...], what: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise UsageError(
                f"no parameter matches {pattern!r}, which is to be {what}",
                hint="names look like " + some(names),
            )
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
