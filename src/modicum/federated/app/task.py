"""What both halves of the app share: the settings of a run, its strategy, and a client's site."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from modicum.errors import InvalidInput, UsageError
from modicum.federated.cases import CASES, Case
from modicum.federated.client_app import Site
from modicum.federated.federation import (
    client_plans,
    initial_weights,
    make_learner,
    shots_in_all,
)
from modicum.federated.flower import Context
from modicum.federated.layout import Layout
from modicum.federated.learner import Learner
from modicum.federated.populations import Few, Population, Streams
from modicum.federated.rules import AnyRule, FederatedRule
from modicum.federated.server import Server
from modicum.federated.strategy import Federate
from modicum.graph import Frozen
from modicum.lower import Loss
from modicum.plan import Plan

NODE = ("learner", "link", "data", "cache", "board")
"""What a node can have otherwise than the run: clients differ in what they are."""


class Settings(Frozen):
    """What a run config says, with `-` for `_`; `NODE` are settings that a node config overrides.

    case: a use case of `cases.CASES`; data: the paths that it reads, with os.pathsep between them.
    rule: a method's name, or JSON with its `kind` and other values; what is not said there is the
    case's.  The first `clients` of the population take part, and so many `newcomers` are judged
    every `judge_every` rounds (0: never), each with `shots` (0: the case's) and `tests` samples,
    `tasks` times.  board: a plan has to fit it.  learner: what clients train with; link: of a
    board, where it is (``/dev/ttyACM0``, ``host:port``).  out: the server's folder, from which a
    run that was killed goes on; cache: where clients keep emitted C (by default with Flower's own
    files).  Seconds: `wait` for clients at the start, `timeout` for their answers in a round.
    """

    case: str = "sines"
    data: str = ""
    rule: str = "tinymetafed"
    rounds: Annotated[int, Field(ge=1)] = 100
    clients: Annotated[int, Field(ge=1)] = 8
    newcomers: Annotated[int, Field(ge=0)] = 0
    judge_every: Annotated[int, Field(ge=0)] = 0
    shots: Annotated[int, Field(ge=0)] = 0
    tests: Annotated[int, Field(ge=1)] = 50
    tasks: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    learner: Literal["torch", "native", "board"] = "torch"
    link: str = ""
    board: str = ""
    out: str = ""
    cache: str = ""
    wait: Annotated[float, Field(gt=0)] = 120.0
    timeout: Annotated[float, Field(gt=0)] = 3600.0

    @staticmethod
    def of(run: Mapping[str, Any], node: Mapping[str, Any] | None = None) -> Settings:
        """Read a run config and what a node has otherwise.  Raises UsageError."""
        given = {**run, **{k: v for k, v in (node or {}).items() if k in NODE}}
        try:
            return Settings.model_validate({k.replace("-", "_"): v for k, v in given.items()})
        except ValidationError as error:
            raise UsageError("the run config does not fit", why=_lines(error)) from None

    def config(self) -> dict[str, Any]:
        """The run config that says this."""
        return {k.replace("_", "-"): v for k, v in self.model_dump().items()}


def strategy_of(settings: Settings, **more: Any) -> Federate:
    """The server's side: the weights that a federation starts from, and its strategy."""
    model, _, rule, plans = _problem(settings)
    server = Server(
        rule, Layout.of(plans[0], rule.local).model, initial_weights(model, plans[0], rule),
        settings.rounds, settings.seed,
    )  # fmt: skip
    return Federate(
        server, settings.clients, judge_every=settings.judge_every, wait_s=settings.wait,
        folder=settings.out or None, **more,
    )  # fmt: skip


def open_site(context: Context) -> Site:
    """The client's side of the run that a context belongs to, made once in a process."""
    return site_of(Settings.of(context.run_config, context.node_config))


@lru_cache(maxsize=4)
def site_of(settings: Settings) -> Site:
    """A site whose learners are made when they are first needed: most clients need one of two."""
    model, population, rule, plans = _problem(settings)
    training, deployment = (
        cast(Learner, _Late(lambda plan=plan: _learner(settings, model, plan, rule)))  # type: ignore[misc]
        for plan in plans
    )
    shots = settings.shots or CASES[settings.case].shots
    return Site(
        rule, population, training, deployment, shots, settings.tests, settings.tasks,
        settings.seed,
    )  # fmt: skip


def rule_of(text: str, case: Case) -> FederatedRule:
    """A method by its name or as JSON; what is not said is the case's.

    >>> rule_of("tinyreptile", CASES["sines"]).rate
    0.02
    >>> rule_of('{"kind": "tinymetafed", "top": 0.1}', CASES["sines"]).local
    ('layers.4.*',)
    """
    try:
        given = json.loads(text) if text.lstrip().startswith("{") else {"kind": text}
        mine: dict[str, Any] = {"rate": case.rate, "rate_local": case.rate_local, "tune": case.tune}
        if given.get("support", _SUPPORT.get(given.get("kind"))):  # this method keeps a part local
            mine["local"] = case.local
        return _RULES.validate_python({**mine, **given})
    except ValidationError as error:
        raise UsageError(f"the rule {text!r} does not fit", why=_lines(error)) from None
    except ValueError as error:
        raise UsageError(f"the rule {text!r} is not JSON", why=str(error)) from None


class Fewer:
    """The first clients and newcomers of a population.  Raises UsageError for too many."""

    def __init__(self, whole: Population, clients: int, newcomers: int) -> None:
        for what, asked in (("clients", clients), ("newcomers", newcomers)):
            have = getattr(whole, what)
            if asked > have:
                raise UsageError(f"there are {have} {what}, {asked} are asked for")
        self.whole, self.clients, self.newcomers = whole, clients, newcomers
        self.loss: Loss = whole.loss

    def streams(self, client: int, support: int, query: int, rng: np.random.Generator) -> Streams:
        if client >= self.clients:
            raise UsageError(f"client {client} is a new one: it takes part in no round")
        return self.whole.streams(client, support, query, rng)

    def newcomer(self, which: int, shots: int, query: int, rng: np.random.Generator) -> Few:
        return self.whole.newcomer(which, shots, query, rng)


_RULES: TypeAdapter[FederatedRule] = TypeAdapter(AnyRule)
_SUPPORT = {
    of.model_fields["kind"].default: of.model_fields["support"].default
    for of in FederatedRule.__subclasses__()
}


class _Late:
    """A learner that is made when it is first asked for something."""

    def __init__(self, make: Callable[[], Learner]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Learner:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._made, name)


@lru_cache(maxsize=4)
def _problem(settings: Settings) -> tuple[nn.Module, Population, FederatedRule, tuple[Plan, Plan]]:
    """Model, population, rule and plans: the same in every process of a run."""
    if settings.case not in CASES:
        raise UsageError(f"no case is called {settings.case!r}", hint=", ".join(CASES))
    case = CASES[settings.case]
    rule = rule_of(settings.rule, case)
    paths = [p for p in settings.data.split(os.pathsep) if p]
    population = Fewer(case.population(paths, settings.seed), settings.clients, settings.newcomers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = case.model()
    shots = shots_in_all(population.whole, settings.shots or case.shots)
    example = torch.zeros(1, *case.input)
    plans = client_plans(model, example, rule, case.loss, shots, settings.board or None)
    return model, population, rule, plans


def _learner(settings: Settings, model: nn.Module, plan: Plan, rule: FederatedRule) -> Learner:
    if settings.learner == "torch":
        return make_learner(model, plan, rule, "torch", Path())
    if settings.learner == "board":
        return _board(settings, plan, rule)
    folder = Path(settings.cache) if settings.cache else _home() / "modicum"
    with _alone(folder):  # processes that start together would build the same folder
        return make_learner(model, plan, rule, "native", folder)


def _board(settings: Settings, plan: Plan, rule: FederatedRule) -> Learner:
    """The board of this node, on a serial device or a socket."""
    from modicum.federated.board import BoardLearner
    from modicum.federated.link import Link, Serial, Socket

    if not settings.link:
        raise UsageError(
            "there is no board without a link", hint='node config: link="/dev/ttyACM0" or host:port'
        )
    device = settings.link.startswith("/dev/")
    line = Serial(settings.link) if device else Socket(settings.link)
    return BoardLearner(Link(line), plan, rule.local)


def _home() -> Path:
    """Where Flower keeps its own files on this node."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InvalidInput(f"cannot keep emitted C in {folder}", why=str(error)) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lines(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors()]
