"""Methods side by side: the same network, data and budget for each; accuracy against memory.

Every training is one JSON file that says all it depends on.  A rerun trains only what is missing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from modicum import __version__
from modicum import board as catalogue
from modicum.accounting import account
from modicum.adapt import (
    Schedule,
    accuracy,
    evaluate,
    passes_of_stream,
    sample_losses,
    train_passes,
)
from modicum.apply import Tuned
from modicum.board import Board
from modicum.capture import capture
from modicum.errors import Diverged, InvalidInput, UsageError
from modicum.graph import Frozen, Graph
from modicum.lite import prepare_model
from modicum.methods import Method
from modicum.optim import SGD, Adam
from modicum.plan import Plan, plan
from modicum.report.comparison import Budget, Comparison, Row, interval, write
from modicum.report.tables import memory_of
from modicum.tasks import Augment, Labelled, Preprocess, Stream, check, same_classes, split
from modicum.units import duration, percent

__all__ = ["Budget", "Comparison", "Row", "Run", "compare_methods"]

VERSION: Literal[1] = 1
VALIDATION_SEED = 1789
"""Of the split, the network and the order of samples that learning rates are chosen with."""
KEPT = (0.8, 0.2)
"""Shares of the training set to train on and to choose by, when learning rates are chosen."""
NO_LIMIT = 1 << 62

Model: TypeAlias = nn.Module | Callable[[], nn.Module]


def compare_methods(
    model: Model,
    methods: Mapping[str, Method],
    train: Labelled,
    test: Labelled,
    preprocess: Preprocess,
    *,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 10,
    batch: int = 8,
    optimizer: SGD | Adam | None = None,
    rates: Sequence[float] = (),
    schedule: Schedule = "cosine",
    augment: Augment | None = None,
    board: Board | str | None = None,
    progress: bool = False,
) -> Comparison:
    """Train each method on the same data with the same budget, and put them in one table.

    `model` is a network, or a function that makes one and that is called for each of `seeds`, with
    PyTorch's generator seeded.  A network whose outputs are not as many as the classes gets a new
    last linear layer, seeded too; so all methods start from the same weights.  The seed also
    draws the order of the samples and what `augment` makes of them.

    With several learning `rates` each method takes the one that does best on a fifth of the
    training set, after training on the rest with a seed of its own; the test set has no say.
    Without `rates` every method takes that of `optimizer`.

    `out` gets a file per training, and the comparison as .json, .txt, .svg and .png.  With `board`
    the table says who fits; methods that do not are trained all the same.  A method that does not
    apply to the model, or whose training diverges, is listed with the reason.  Raises
    InvalidInput for data that does not fit, and UsageError where no method is left.
    """
    if not methods or not seeds or epochs < 1 or batch < 1:
        raise UsageError("nothing to compare", hint="a method, a seed, an epoch, a batch of 1")
    if len(set(seeds)) < len(seeds) or not all(0 < rate < float("inf") for rate in rates):
        raise UsageError("seeds differ from each other, and learning rates are above 0")
    target = catalogue.get(board) if isinstance(board, str) else board
    budget = Budget(
        epochs=epochs,
        batch=batch,
        optimizer=optimizer or SGD(),
        schedule=schedule,
        augment=augment,
        preprocess=preprocess,
    )
    rates = tuple(dict.fromkeys(rates)) or (budget.optimizer.lr,)
    same_classes(train, test)
    for dataset in (train, test):
        check(dataset)
    lab = _Lab(_start(model, preprocess, len(train.classes), seeds[0]), budget, Path(out), progress)
    lab.prepare()
    plans, left_out = lab.plans(methods, rates, target, seeds[0])
    lab.total = len(plans) * (len(seeds) + (len(rates) if len(rates) > 1 else 0))
    whole = _Sets.of(train, test)
    parts = _Sets.of(*split(train, KEPT, seed=VALIDATION_SEED)) if len(rates) > 1 else None
    rows = []
    for label, by_rate in plans.items():
        tried = {} if parts is None else lab.try_rates(label, by_rate, parts)
        rate = max(tried, key=lambda r: tried[r].score, default=rates[0])
        runs = [lab.run(f"{label}, seed {s}", by_rate[rate], s, whole) for s in seeds]
        failed = next((run.failed for run in runs if run.failed), None)
        if failed:
            left_out[label] = f"{failed}, with a learning rate of {rate:g}"
        else:
            rows.append(_row(label, by_rate[rate], tried, runs))
    if not rows:
        why = [f"{label}: {reason}" for label, reason in left_out.items()]
        raise UsageError("none of the methods could be compared", why=why)
    graph = lab.start.base
    made = Comparison(
        graph=graph.hash,
        input=graph.shape(graph.input),
        classes=train.classes,
        train=len(train),
        test=len(test),
        seeds=tuple(seeds),
        rates=rates,
        board=target.name if target else None,
        budget=budget,
        rows=tuple(rows),
        left_out=left_out,
    )
    made.save(Path(out))
    return made


class Run(Frozen):
    """One training: `inputs` is all that it depends on, the rest is what came of it.

    `accuracy` and `loss` (mean cross entropy) are of the test set after training, `losses` the
    mean of each epoch.  `failed` says why there are none.
    """

    version: Literal[1] = VERSION
    inputs: dict[str, Any]
    accuracy: float | None = None
    loss: float | None = None
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    seconds_per_step: float = 0.0
    failed: str | None = None
    made_with: dict[str, str] = {}

    @property
    def score(self) -> tuple[float, float]:
        """The larger, the better."""
        if self.accuracy is None or self.loss is None:
            return -1.0, 0.0
        return self.accuracy, -self.loss


# ---- where all methods start from --------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """The networks that all methods start from, one per seed.  `head` gets a new layer, if any."""

    model: Model
    example: Tensor
    classes: int
    base: Graph
    head: str | None

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _made(self.model)
            torch.manual_seed(seed)  # a new head does not depend on what the model draws
            if self.head is not None:
                old = net.get_submodule(self.head)
                _replace(net, self.head, nn.Linear(old.in_features, self.classes).to(_where(net)))
            return net.eval()

    def prepared(self, seed: int, method: Method) -> nn.Module:
        """The network with what a method adds to it."""
        return prepare_model(self.network(seed), self.example, method)

    def graph(self, method: Method, seed: int) -> Graph:
        net = self.network(seed)
        prepared = prepare_model(net, self.example, method)
        return self.base if prepared is net else capture(prepared, self.example)


def _start(model: Model, preprocess: Preprocess, classes: int, seed: int) -> _Start:
    """Find out whether the network needs a new head, and where that is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _made(model)
    example = torch.zeros(1, *preprocess.shape, device=_where(net))
    graph = capture(net, example)
    outputs = graph.values[graph.output].size
    if outputs == classes:
        return _Start(model, example, classes, graph, None)
    last = graph.nodes[-1]
    name = last.params.get("weight", "").rpartition(".")[0]
    if last.op != "linear" or not name or not isinstance(net.get_submodule(name), nn.Linear):
        raise UsageError(
            f"the model has {outputs} outputs, the data has {classes} classes",
            why="it does not end with a linear layer that could be replaced",
            hint=f"a function that makes the model with {classes} outputs",
        )
    start = _Start(model, example, classes, graph, name)
    base = capture(start.network(seed), example)
    return _Start(model, example, classes, base, name)


def _made(model: Model) -> nn.Module:
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model()


def _replace(net: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


def _where(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _plan(graph: Graph, method: Method, budget: Budget, rate: float, board: Board | None) -> Plan:
    """A plan without limits: a method that does not fit the board is compared all the same."""
    optimizer = budget.optimizer.model_copy(update={"lr": rate})
    return plan(
        graph, board, method, optimizer, accumulate=budget.batch, ram=NO_LIMIT, flash=NO_LIMIT
    )


# ---- trainings and their files -----------------------------------------------------------------


@dataclass(frozen=True)
class _Sets:
    """What a training sees, and fingerprints of it."""

    train: Labelled
    test: Labelled
    prints: dict[str, Any]

    @staticmethod
    def of(train: Labelled, test: Labelled) -> _Sets:
        return _Sets(train, test, {"train": _fingerprint(train), "test": _fingerprint(test)})


@dataclass
class _Lab:
    """Trains what has not been trained yet, and says so."""

    start: _Start
    budget: Budget
    out: Path
    progress: bool
    total: int = 0
    done: int = field(default=0, init=False)

    def prepare(self) -> None:
        """Find out now, not after the first training, that nothing can be written."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot write to {self.out}", why=str(error)) from None

    def plans(
        self, methods: Mapping[str, Method], rates: Sequence[float], board: Board | None, seed: int
    ) -> tuple[dict[str, dict[float, Plan]], dict[str, str]]:
        """Plans by method and learning rate, and why other methods have none."""
        plans: dict[str, dict[float, Plan]] = {}
        left_out: dict[str, str] = {}
        for label, method in methods.items():
            try:
                graph = self.start.graph(method, seed)
                plans[label] = {r: _plan(graph, method, self.budget, r, board) for r in rates}
            except UsageError as error:
                more = [line for key in ("why", "where") for line in error.details.get(key, ())]
                left_out[label] = "; ".join([error.what, *more])
                self.say(f"{label} left out: {left_out[label]}")
        return plans, left_out

    def try_rates(self, label: str, by_rate: Mapping[float, Plan], sets: _Sets) -> dict[float, Run]:
        return {
            rate: self.run(f"{label}, lr {rate:g}", made, VALIDATION_SEED, sets, "validation")
            for rate, made in by_rate.items()
        }

    def run(self, title: str, made: Plan, seed: int, sets: _Sets, folder: str = "") -> Run:
        """The Run of a plan with a seed, from its file if there is one."""
        net = self.start.prepared(seed, made.method)
        inputs = self._inputs(net, made, seed, sets)
        name = f"{made.method.kind}-seed{seed}-{_digest(inputs)[:12]}.json"
        path = self.out / folder / name
        run, before = _read(path, inputs), ", trained before"
        if run is None:
            run, before = self._train(net, made, seed, sets, inputs), ""
            write(path, (run.model_dump_json(indent=1) + "\n").encode())
        self.done += 1
        came = run.failed or f"{percent(run.accuracy or 0.0)} in {duration(run.seconds)}"
        self.say(f"{self.done}/{self.total} {title}: {came}{before}")
        return run

    def _inputs(self, net: nn.Module, made: Plan, seed: int, sets: _Sets) -> dict[str, Any]:
        inputs = {
            "modicum": __version__,
            "model": {"graph": made.graph.hash, "weights": _weights_hash(net)},
            "method": made.method.model_dump(mode="json"),
            "selection": _digest(made.selection.model_dump(mode="json")),
            "data": sets.prints,
            "seed": seed,
            **self.budget.model_dump(mode="json"),
            "optimizer": made.optimizer.model_dump(mode="json"),
        }
        plain: dict[str, Any] = json.loads(json.dumps(inputs))
        return plain

    def _train(
        self, net: nn.Module, made: Plan, seed: int, sets: _Sets, inputs: dict[str, Any]
    ) -> Run:
        b = self.budget
        stream = Stream(
            sets.train, b.preprocess, b.batch, seed=seed, epochs=b.epochs, augment=b.augment
        )
        tuned = Tuned(net, made)  # as `apply`, which would capture the network again
        made_with = {"torch": torch.__version__, "python": platform.python_version()}
        made_with |= {"threads": str(torch.get_num_threads()), "device": str(_where(net))}
        try:
            passes = passes_of_stream(made, stream)
            trace = train_passes(tuned, passes, b.schedule, progress=self.progress)
        except Diverged as error:
            return Run(inputs=inputs, failed=error.what, made_with=made_with)
        logits, labels = evaluate(tuned, (sets.test, b.preprocess))
        if not np.isfinite(logits).all():
            why = "the outputs are not finite after training"
            return Run(inputs=inputs, failed=why, made_with=made_with)
        losses = sample_losses(made, torch.from_numpy(logits), torch.from_numpy(labels))
        epochs = np.array_split(np.array(trace.losses), b.epochs)
        return Run(
            inputs=inputs,
            accuracy=accuracy(made, logits, labels),
            loss=float(losses.mean()),
            losses=tuple(float(e.mean()) for e in epochs),
            seconds=trace.figures["seconds"],
            seconds_per_step=trace.figures["seconds_per_step"],
            made_with=made_with,
        )

    def say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)


def _read(path: Path, inputs: dict[str, Any]) -> Run | None:
    """The run in a file, if it is whole and of the same inputs."""
    try:
        run = Run.model_validate_json(path.read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return run if run.inputs == inputs else None


def _fingerprint(dataset: Labelled) -> dict[str, Any]:
    """Decodes every image: the same pixels, labels and classes in the same order, or another."""
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    digest.update(np.ascontiguousarray(dataset.labels, "<i8").tobytes())
    for i in range(len(dataset)):
        pixels = dataset.image(i)
        digest.update(f"{pixels.shape}{pixels.dtype.str}".encode())
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return {"images": len(dataset), "sha256": digest.hexdigest()}


def _weights_hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        array = value.detach().cpu().numpy()
        digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _row(label: str, made: Plan, tried: Mapping[float, Run], runs: Sequence[Run]) -> Row:
    accuracies = tuple(run.accuracy or 0.0 for run in runs)
    cost, board = made.cost, made.board
    return Row(
        label=label,
        method=made.method,
        rate=made.optimizer.lr,
        validation={f"{rate:g}": run.accuracy for rate, run in tried.items()},
        accuracies=accuracies,
        accuracy=float(np.mean(accuracies)),
        interval=interval(accuracies),
        trained_params=cost.trained_params,
        saved=cost.saved,
        saved_batch=(saved := account(made, made.accumulate).total.saved),
        memory=saved + 4 * cost.trained_params + cost.optimizer_bytes,
        dynamic=memory_of(made).dynamic,
        ram=cost.ram,
        flash=cost.flash,
        fits=None if board is None else cost.ram <= board.available and cost.flash <= board.flash,
        macs_forward=cost.macs_forward,
        macs_backward=cost.macs_backward,
        seconds=float(np.mean([run.seconds for run in runs])),
        seconds_per_step=float(np.median([run.seconds_per_step for run in runs])),
    )
