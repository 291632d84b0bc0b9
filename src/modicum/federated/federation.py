"""A federation from a model and a rule: plans, learners, and all rounds in this process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from modicum.adapt import progress_bar
from modicum.board import Board
from modicum.capture import capture
from modicum.emit import emit
from modicum.errors import InvalidInput, UsageError
from modicum.federated.client_app import Site, client_app
from modicum.federated.energy import Energy
from modicum.federated.flower import quiet
from modicum.federated.grid import LocalGrid
from modicum.federated.layout import Array
from modicum.federated.learner import Learner, NativeLearner
from modicum.federated.populations import Population
from modicum.federated.rules import FederatedRule
from modicum.federated.server import RoundLog, Server
from modicum.federated.strategy import Federate, Judgement, run_rounds
from modicum.federated.torch_learner import TorchLearner
from modicum.lower import Loss
from modicum.plan import Plan, plan
from modicum.report.federation import save_curves

Kind = Literal["native", "torch"]
Point = tuple[int, float, float, float]


@dataclass(frozen=True)
class History:
    """What a federation came to.

    `rounds` and `judgements` in order; the latter say how new clients did after that many rounds,
    as mean squared error or accuracy.  Bytes are the codec's, down and up together.
    """

    rule: dict[str, Any]
    seed: int
    loss: Loss
    rounds: list[RoundLog]
    judgements: list[Judgement]
    ram: int
    shared: int
    local: int
    weights: Array

    @property
    def bytes(self) -> int:
        """Of all messages of all rounds, both ways."""
        return sum(r.bytes_down + r.bytes_up for r in self.rounds)

    def spent(self, round: int) -> int:
        """Bytes until the end of a round, both ways."""
        return sum(r.bytes_down + r.bytes_up for r in self.rounds[:round])

    @property
    def last(self) -> Judgement | None:
        return self.judgements[-1] if self.judgements else None

    def points(self, joules: float = 0.0, energy: Energy | None = None) -> list[Point]:
        """(round, bytes, joules, quality) after each judged round, for `report.federation`.

        With `energy`, `joules` is what a client computes a round for; the radio comes on top.
        """
        made = []
        for j in self.judgements:
            asked = sum(len(r.asked) for r in self.rounds[: j.round])
            radio = energy.radio(self.spent(j.round)) if energy else 0.0
            made.append((j.round, float(self.spent(j.round)), asked * joules + radio, j.after))
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the weights."""
        return {
            "rule": self.rule, "seed": self.seed, "loss": self.loss, "ram": self.ram,
            "shared": self.shared, "local": self.local, "bytes": self.bytes,
            "rounds": [r.as_dict() for r in self.rounds],
            "judgements": [j.as_dict() for j in self.judgements],
        }  # fmt: skip

    def __str__(self) -> str:
        return render(self)


def federate(
    model: nn.Module,
    example: Any,
    rule: FederatedRule,
    population: Population,
    *,
    rounds: int = 100,
    board: Board | str | None = None,
    learner: Kind = "native",
    shots: int = 10,
    tests: int = 50,
    tasks: int = 1,
    judge_every: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    workspace: str | Path | None = None,
    progress: bool = False,
) -> History:
    """Run a federation over a population in this process, with Flower's strategy and client app.

    Clients train in the emitted C of their plan (`native`), or in PyTorch; the plan has to fit
    `board`.  New clients are judged before the first round, every `judge_every` rounds and after
    the last: each learns from `shots` and is tested on `tests` samples, `tasks` times.  The same
    seed gives the same result to the bit.  With `out` the state is on disk after each round and a
    run that was killed goes on there; it ends with ``weights.npz`` and ``history.json``.
    `workspace` keeps emitted folders for other runs.

    Raises DoesNotFit where the plan does not fit, UsageError for rules that do not fit the model
    or the population, InvalidInput for a folder of another federation.
    """
    quiet()
    if population.loss not in ("mse", "cross_entropy"):
        raise UsageError(f"no loss is called {population.loss!r}")
    few = shots_in_all(population, shots)
    plans = client_plans(model, example, rule, population.loss, few, board)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(workspace) if workspace is not None else Path(scratch)
        training, deployment = (make_learner(model, p, rule, learner, place) for p in plans)
        layout = training.layout
        few = few if rule.reconstruct else 0
        site = Site(rule, population, training, deployment, shots, tests, tasks, seed, few)
        nodes = population.clients + (population.newcomers if judge_every else 0)
        grid = LocalGrid(client_app(lambda context: site), nodes)
        server = Server(rule, layout.model, training.shared(), rounds, seed)
        with progress_bar(progress, rounds, "federate") as advance:
            strategy = Federate(
                server, population.clients, judge_every=judge_every, folder=out,
                on_round=lambda log: advance(),
            )  # fmt: skip
            run_rounds(strategy, grid)
    made = History(
        rule.model_dump(mode="json"), seed, population.loss, strategy.rounds, strategy.judgements,
        plans[0].cost.ram, layout.size, sum(p.size for p in layout.local), server.theta,
    )  # fmt: skip
    if out is not None:
        np.savez(Path(out) / "weights.npz", **layout.split(server.theta))  # type: ignore[arg-type]
        (Path(out) / "history.json").write_text(json.dumps(made.as_dict()) + "\n")
        if made.judgements:
            name = "mean squared error" if made.loss == "mse" else "accuracy"
            save_curves(Path(out) / "curve.svg", {rule.kind: [made.points()]},
                        f"{name} of new clients after {shots} shots", str(out))  # fmt: skip
    return made


def client_plans(
    model: nn.Module,
    example: Any,
    rule: FederatedRule,
    loss: Loss,
    shots: int,
    board: Board | str | None = None,
) -> tuple[Plan, Plan]:
    """The plans that a client trains by in a round, and a new client learns by from `shots`."""
    graph = capture(model, example)
    made = []
    for method, optimizer in (rule.training(graph), rule.deployment(graph, shots)):
        made.append(plan(graph, board, method, optimizer, loss=loss, accumulate=rule.batch))
    return made[0], made[1]


def shots_in_all(population: Population, shots: int) -> int:
    """How many samples a new client learns from: `shots`, or of labels so many of each class."""
    rng = np.random.default_rng(0)
    return len(population.newcomer(0, shots, 1, rng)[0])


def make_learner(
    model: nn.Module, plan: Plan, rule: FederatedRule, kind: Kind, workspace: Path
) -> Learner:
    """A learner of a plan.

    The emitted C is made once in the workspace, under a name that plan and weights decide.
    """
    if kind == "torch":
        return TorchLearner(model, plan, rule.local)
    if kind != "native":
        raise UsageError(f"no learner is called {kind!r}", hint="native, torch")
    folder = workspace / f"c-{_digest(model, plan)}"
    with alone(workspace):  # processes that start together would build the same folder
        if not (folder / "net.mk").is_file():
            emit(model, plan, folder)
        return NativeLearner(folder, rule.local)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time in a folder.  Raises InvalidInput where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InvalidInput(f"{folder} cannot be the cache", why=str(error)) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def initial_weights(model: nn.Module, plan: Plan, rule: FederatedRule) -> Array:
    """The shared weights as they are in the model."""
    return TorchLearner(model, plan, rule.local).shared()


def render(history: History) -> str:
    """A few lines: what it was, what it came to, what it cost."""
    name = "error" if history.loss == "mse" else "accuracy"
    failed = sum(len(r.failed) for r in history.rounds)
    lines = [
        f"{history.rule['kind']}: {len(history.rounds)} rounds, "
        f"{history.shared:,} parameters shared, {history.local:,} kept by clients"
    ]
    for j in _some(history.judgements):
        lines.append(f"  round {j.round:<6} {name} of new clients {j.before:.4g} -> {j.after:.4g}")
    down, up = (sum(getattr(r, k) for r in history.rounds) for k in ("bytes_down", "bytes_up"))
    lines.append(f"  bytes         {down:,} down, {up:,} up (codec)")
    lines.append(f"  RAM           {history.ram:,} bytes of a client's plan")
    if failed:
        reasons = [why for r in history.rounds for why in r.failed.values()]
        lines.append(f"  not used      {failed} answers, the last because {reasons[-1]}")
    return "\n".join(lines)


def _some(judgements: Sequence[Judgement], most: int = 6) -> list[Judgement]:
    """The first, the last, and some between."""
    n = len(judgements)
    if n <= most:
        return list(judgements)
    return [judgements[round(i * (n - 1) / (most - 1))] for i in range(most)]


def _digest(model: nn.Module, plan: Plan) -> str:
    digest = hashlib.sha256(plan.hash.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()[:20]
