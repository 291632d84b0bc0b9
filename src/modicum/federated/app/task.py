"""What both halves of the app share: the settings of a run, its strategy, and a client's site."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import nn

import modicum
from modicum.emit import emit
from modicum.errors import UsageError
from modicum.federated.app.privacy import Noisy
from modicum.federated.cases import CASES, Case, rule_for
from modicum.federated.client_app import Site
from modicum.federated.federation import (
    alone,
    client_plans,
    initial_weights,
    make_learner,
    shots_in_all,
)
from modicum.federated.flower import Context, Grid, Strategy
from modicum.federated.layout import Layout
from modicum.federated.learner import Learner
from modicum.federated.populations import Few, Population, Streams
from modicum.federated.rules import FEDERATED, FederatedRule
from modicum.federated.server import Server
from modicum.federated.strategy import Federate, run_rounds
from modicum.graph import Frozen
from modicum.lower import Loss
from modicum.plan import Plan
from modicum.run import MACHINES

EMULATED = ("host", *MACHINES)
"""Boards that need no board: their firmware as a program of this machine, or under QEMU."""
NODE = ("learner", "link", "data", "cache", "board")
"""What a node can have otherwise than the run: clients differ in what they are."""


class Settings(Frozen):
    """What a run config says, with `-` for `_`; `NODE` are settings that a node config overrides.

    >>> Settings.of({"judge-every": 5}, {"partition-id": 0, "learner": "native"}).learner
    'native'
    """

    case: str = Field("sines", description="a use case: " + ", ".join(CASES))
    data: str = Field("", description=f"the case's files, with {os.pathsep!r} between them")
    rule: str = Field(
        "tinymetafed",
        description="a method, or JSON with its kind and other values; the rest is the case's",
    )
    rounds: int = Field(100, ge=1, description="rounds in all")
    clients: int = Field(8, ge=1, description="the first of the population, which take part")
    newcomers: int = Field(0, ge=0, description="new clients, which are judged")
    judge_every: int = Field(0, ge=0, description="rounds between judgements, 0: never")
    shots: int = Field(
        0, ge=0, description="samples (of each class) of a new client, 0: the case's"
    )
    tests: int = Field(50, ge=1, description="samples that it is tested on")
    tasks: int = Field(1, ge=1, description="times that it is, each with other samples")
    seed: int = Field(0, ge=0, description="of the weights, the samples, and who takes part")
    learner: Literal["torch", "native", "board"] = Field(
        "torch", description="what a client trains with: PyTorch, the emitted C, or a board"
    )
    link: str = Field(
        "",
        description="where a client's board is: /dev/ttyACM0, host:port, or emulated: "
        + ", ".join(EMULATED),
    )
    board: str = Field("", description="a board that the plan has to fit")
    dp_noise: float = Field(0.0, ge=0, description="differential privacy: noise, by dp-clip")
    dp_clip: float = Field(0.0, ge=0, description="the norm of a client's change at most, 0: off")
    out: str = Field("", description="the server's folder: a run that was killed goes on from it")
    cache: str = Field("", description="a client's folder of plans and emitted C")
    wait: float = Field(120.0, gt=0, description="seconds to wait for clients at the start")
    timeout: float = Field(3600.0, gt=0, description="seconds to wait for answers in a round")

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

    @property
    def place(self) -> Path:
        """The cache's folder."""
        home = os.environ.get("FLWR_HOME")
        default = Path(home) / "modicum" if home else Path.home() / ".cache" / "modicum"
        return Path(self.cache) if self.cache else default


def strategy_of(settings: Settings, **more: Any) -> Federate:
    """The server's side: the weights that a federation starts from, and its strategy.

    It reads no data; `more` goes to `Federate`.
    """
    case, rule = _case_and_rule(settings)
    model = _model(settings)
    plan, _ = _plans(settings, model, settings.shots or case.shots)
    server = Server(
        rule, Layout.of(plan, rule.local).model, initial_weights(model, plan, rule),
        settings.rounds, settings.seed,
    )  # fmt: skip
    return Federate(
        server, settings.clients, judge_every=settings.judge_every, wait_s=settings.wait,
        folder=settings.out or None, open_weights=settings.dp_clip > 0, **more,
    )  # fmt: skip


def run(settings: Settings, strategy: Federate, grid: Grid) -> None:
    """All rounds that are left, on any of Flower's grids; with noise if the settings say so."""
    outer: Strategy = strategy
    if settings.dp_clip:
        outer = Noisy(strategy, settings.dp_noise, settings.dp_clip)
    elif settings.dp_noise:
        raise UsageError("dp-noise is relative to dp-clip, which is 0")
    run_rounds(strategy, grid, wrap=lambda inner: outer, timeout=settings.timeout)


def open_site(context: Context) -> Site:
    """The client's side of the run that a context belongs to."""
    return site_of(context.run_config, context.node_config)


def site_of(run: Mapping[str, Any], node: Mapping[str, Any]) -> Site:
    """The client's side, by run config and node config, made once in a process."""
    settings = Settings.of(run, node)
    new = int(node["partition-id"]) >= settings.clients
    return _site(settings, new if settings.learner == "board" else False)


@lru_cache(maxsize=4)
def _site(settings: Settings, new: bool) -> Site:
    """`new` says which of the two plans a board has, which has one.

    The learners are made when they are first needed: most clients need one of the two.
    """
    case, rule = _case_and_rule(settings)
    paths = [p for p in settings.data.split(os.pathsep) if p]
    whole = case.population(paths, settings.seed)
    shots = settings.shots or case.shots
    model = _model(settings)
    plans = _plans(settings, model, shots_in_all(whole, shots))
    if settings.learner == "board":
        training = deployment = _board(settings, model, plans[new], rule)
    else:
        training, deployment = (
            cast(Learner, _Late(partial(_learner, settings, model, plan, rule))) for plan in plans
        )
    return Site(
        rule, Fewer(whole, settings.clients, settings.newcomers), training, deployment, shots,
        settings.tests, settings.tasks, settings.seed,
    )  # fmt: skip


def firmware_of(settings: Settings, folder: str | Path) -> Path:
    """Write the C of a client that takes part in rounds, to be built and flashed: see `Emulated`.

    It is that of these settings: another rule, case or seed is another firmware.
    """
    case, rule = _case_and_rule(settings)
    model = _model(settings)
    plan, _ = _plans(settings, model, settings.shots or case.shots)
    return firmware(model, plan, rule, Path(folder))


def firmware(model: nn.Module, plan: Plan, rule: FederatedRule, folder: Path) -> Path:
    """An emitted folder whose firmware keeps the local parameters of a rule to itself."""
    from modicum.federated.board import keep_private

    emit(model, plan, folder)
    keep_private(folder, rule.local)
    return folder


def rule_of(text: str, case: Case) -> FederatedRule:
    """A method by its name or as JSON; what is not said is the case's.

    >>> rule_of("tinyreptile", CASES["sines"]).query
    32
    >>> rule_of('{"kind": "tinymetafed", "top": 0.1}', CASES["sines"]).local
    ('layers.4.*',)
    """
    try:
        given = json.loads(text) if text.lstrip().startswith("{") else {"kind": text}
    except ValueError as error:
        raise UsageError(f"the rule {text!r} is not JSON", why=str(error)) from None
    kind = str(given.pop("kind", None))
    fields = rule_for(case, kind, given)
    try:
        return FEDERATED[kind].model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"the rule {text!r} does not fit", why=_lines(error)) from None


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


class _Late:
    """A learner that is made when it is first asked for something."""

    def __init__(self, make: Callable[[], Learner]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Learner:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


def _case_and_rule(settings: Settings) -> tuple[Case, FederatedRule]:
    if settings.case not in CASES:
        raise UsageError(f"no case is called {settings.case!r}", hint=", ".join(CASES))
    case = CASES[settings.case]
    return case, rule_of(settings.rule, case)


def _model(settings: Settings) -> nn.Module:
    """The same weights in every process of a run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return CASES[settings.case].model()


def _plans(settings: Settings, model: nn.Module, shots: int) -> tuple[Plan, Plan]:
    """Those of a round, and of a new client with so many samples, made once for all processes."""
    case, rule = _case_and_rule(settings)
    inputs = (settings.case, rule.model_dump(mode="json"), shots, settings.board, _code())
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    with alone(settings.place):
        files = [settings.place / f"plan-{key}-{of}.json" for of in ("round", "new")]
        if all(file.exists() for file in files):
            return Plan.load(files[0]), Plan.load(files[1])
        example = torch.zeros(1, *case.input)
        plans = client_plans(model, example, rule, case.loss, shots, settings.board or None)
        for plan, file in zip(plans, files, strict=True):
            plan.save(file)
    return plans


def _learner(settings: Settings, model: nn.Module, plan: Plan, rule: FederatedRule) -> Learner:
    kind: Literal["torch", "native"] = "native" if settings.learner == "native" else "torch"
    return make_learner(model, plan, rule, kind, settings.place / f"c-{_code()}")


def _board(settings: Settings, model: nn.Module, plan: Plan, rule: FederatedRule) -> Learner:
    """The board of this node, on a serial device or a socket; or one that is emulated."""
    from modicum.federated.board import BoardLearner, Emulated
    from modicum.federated.link import Link, Serial, Socket

    if not settings.link:
        raise UsageError(
            "there is no board without a link",
            hint='link="/dev/ttyACM0", or host:port; emulated: ' + ", ".join(EMULATED),
        )
    if settings.link in EMULATED:
        folder = settings.place / f"c-{_code()}" / f"link-{plan.hash[:16]}-{settings.seed}"
        with alone(settings.place):
            if not folder.exists():
                firmware(model, plan, rule, folder)
            return BoardLearner(Emulated(folder, settings.link, rule.local).link, plan, rule.local)
    device = settings.link.startswith("/dev/")
    line = Serial(settings.link) if device else Socket(settings.link)
    return BoardLearner(Link(line), plan, rule.local)


@lru_cache(maxsize=1)
def _code() -> str:
    """Of what was made by this very code: a new version makes it anew."""
    root = Path(modicum.__file__).parent
    found = [
        (str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.suffix != ".pyc"
    ]
    return hashlib.sha256(json.dumps([found, torch.__version__]).encode()).hexdigest()[:12]


def _lines(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors()]
