"""Methods on the same few-shot tasks: accuracy, backward memory and work, selection and time.

Every task that a method has learned is one JSON file that says all it depends on.  A rerun learns
only what is missing, and several processes may work in one folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from modicum import __version__
from modicum.backward_cost import BackwardCost, backward_cost
from modicum.capture import capture
from modicum.errors import Diverged, DoesNotFit, ModicumError, UsageError
from modicum.fewshot import Array, FineTune, fine_tune, observe_task, refresh, task_accuracy
from modicum.graph import Frozen, Graph
from modicum.heads import FewShot, few_shot, linear_from_prototypes, with_ways
from modicum.lite import prepare_model
from modicum.methods import AnyMethod, ObservingMethod
from modicum.optim import SGD, Adam, Optimizer
from modicum.plan import plan
from modicum.report.comparison import write
from modicum.report.tables import memory_of
from modicum.report.tasks import TaskComparison, TaskRow
from modicum.tasks import EpisodeRule, FixedEpisodes, Labelled, Preprocess, arrays, draw_task
from modicum.units import duration, percent

VERSION: Literal[2] = 2
KEEP_BYTES = 512 << 20
"""Images of tasks that are kept as arrays."""

_Drawn: TypeAlias = tuple[tuple[Array, Array], ...]  # support, query
Rate = Annotated[float, Field(gt=0, lt=float("inf"))]


class Contender(Frozen):
    """A method in a comparison on tasks: what it trains, how, and the rates to choose from.

    Without a method nothing is trained: prototypes of the support set alone.  `batch` is the
    number of samples at once by which the papers' convention counts its memory.  A task is learned
    under a cosine head with the prototypes of its classes; with a `linear` one, which begins with
    these prototypes (`linear_from_prototypes`) and is trained, by `Last` alone or beside others.
    """

    method: AnyMethod | None = None
    head: Literal["cosine", "linear"] = "cosine"
    tune: FineTune = FineTune()
    rates: tuple[Rate, ...] = (1e-3,)
    batch: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _trained(self) -> Contender:
        if self.head == "linear" and self.method is None:
            raise ValueError("a linear head is trained: it needs a method")
        return self


@dataclass(frozen=True, eq=False)
class Domain:
    """Where tasks come from: see `draw_task`."""

    dataset: Labelled
    query: Labelled | None = None
    apart: bool = False


class TaskRun(Frozen):
    """A task that a method has learned: `inputs` is all that it depends on.

    cost: of the backward pass, as the papers count it; `plan` figures are of the whole program, a
    sample at a time.  layers: trained elements of each parameter.  seconds: of the fine-tuning;
    selection: of looking at the samples and of making the plan.  `failed` says why the accuracy is
    that of a guess.
    """

    version: Literal[2] = VERSION
    inputs: dict[str, Any]
    accuracy: float
    ways: int
    losses: tuple[float, float] | None = None
    seconds: float = 0.0
    selection: float = 0.0
    cost: BackwardCost | None = None
    plan_saved: int = 0
    plan_dynamic: int = 0
    plan_ram: int = 0
    layers: dict[str, int] = {}
    failed: str | None = None


def compare_on_tasks(
    models: Mapping[str, nn.Module],
    contenders: Mapping[str, Contender],
    domains: Mapping[str, Domain],
    preprocess: Preprocess,
    *,
    out: str | Path,
    tasks: int = 100,
    rule: EpisodeRule | None = None,
    optimizer: SGD | Adam | None = None,
    validation: Mapping[str, Domain] | None = None,
    validation_tasks: int = 12,
    seed: int = 0,
    progress: bool = False,
) -> TaskComparison:
    """Let every method learn the same tasks from the same weights, and put them in one table.

    `models` are few-shot models (`FewShot`, or classifiers, which `few_shot` is made of), such as
    the same net with and without meta-training.  `tasks` of each domain are drawn by `rule` (way
    5 to 10, 5 shots, 10 queries) with `seed`: all methods see the same images and pseudo-queries.

    A contender with several rates takes, for each model, the one with the best mean accuracy over
    `validation_tasks` tasks of the `validation` domains, in turn; these must have other classes.
    `optimizer` (Adam) gives everything but the rate.

    A task on which training diverges counts with the accuracy of a guess, and is listed.  A method
    that does not apply to a model, or whose budget nothing fits, is listed with the reason.

    `out` gets a file for each task and method, and the comparison as .json, .txt, .svg and .png.
    Raises InvalidInput for data that does not fit, UsageError where no method is left.
    """
    if not models or not contenders or not domains or tasks < 1:
        raise UsageError("nothing to compare", hint="a model, a method, a domain and a task")
    several = [label for label, c in contenders.items() if len(c.rates) > 1 and c.method]
    if several and not validation:
        raise UsageError(
            f"{several[0]} has several rates, and there is nothing to choose by",
            hint="validation={name: Domain(...)} with classes that are not tested",
        )
    if several and validation_tasks < 1:
        raise UsageError("rates cannot be chosen on no tasks", hint="validation_tasks from 1 on")
    rule = rule or FixedEpisodes(ways=(5, 10), shots=5, queries=10)
    lab = _Lab(Path(out), preprocess, rule, optimizer or Adam(), seed, progress)
    rows, left_out = [], {}
    for name, model in models.items():
        start = _Start(model, preprocess, name)
        for label, contender in contenders.items():
            try:
                rate, tried = lab.rate(start, label, contender, validation or {}, validation_tasks)
                by_domain = {
                    d: [lab.run(start, label, contender, rate, d, domain, i) for i in range(tasks)]
                    for d, domain in domains.items()
                }
            except (UsageError, DoesNotFit) as error:
                left_out[f"{name}: {label}"] = _reason(error)
                lab.say(f"{name}, {label} left out: {_reason(error)}")
            else:
                rows.append(_row(name, label, contender, rate, tried, by_domain))
    if not rows:
        why = [f"{label}: {reason}" for label, reason in left_out.items()]
        raise UsageError("none of the methods could be compared", why=why)
    made = TaskComparison(
        tasks=tasks,
        rule=rule,
        optimizer=lab.optimizer,
        preprocess=preprocess,
        seed=seed,
        validation=tuple(validation or ()) if several else (),
        validation_tasks=validation_tasks if several else 0,
        rows=tuple(rows),
        left_out=left_out,
    )
    made.save(Path(out))
    return made


def runs_on_tasks(
    model: nn.Module,
    contenders: Mapping[str, Contender],
    domains: Mapping[str, Domain],
    preprocess: Preprocess,
    *,
    out: str | Path,
    tasks: int,
    rule: EpisodeRule,
    optimizer: Optimizer,
    seed: int = 0,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, list[TaskRun]]:
    """The runs of `compare_on_tasks` without its table: of each method, with its first rate.

    Domain by domain, task by task, so that runs in the same place have learned the same task.
    Raises UsageError where a method does not apply to the model.
    """
    lab = _Lab(Path(out), preprocess, rule, optimizer, seed, progress=False)
    start = _Start(model, preprocess, "model")
    found: dict[str, list[TaskRun]] = {label: [] for label in contenders}
    for label, contender in contenders.items():
        for name, domain in domains.items():
            for i in range(tasks):
                found[label].append(
                    lab.run(start, label, contender, contender.rates[0], name, domain, i)
                )
                on_run()
    return found


class _Start:
    """A model that all methods start from, for any number of ways."""

    def __init__(self, model: nn.Module, preprocess: Preprocess, name: str) -> None:
        self.name = name
        self.model = copy.deepcopy(model) if isinstance(model, FewShot) else few_shot(model, 2)
        self.device = next(self.model.parameters()).device
        self.example = torch.zeros(1, *preprocess.shape, device=self.device)
        self._prepared: dict[str, tuple[FewShot, Graph]] = {}
        self._linear: dict[tuple[str, int], Graph] = {}

    def prepared(self, contender: Contender) -> tuple[FewShot, Graph]:
        """The net that a method trains, and its graph; captured once."""
        key = self._key(contender)
        if key not in self._prepared:
            net: Any = self.model
            if contender.method is not None:
                net = prepare_model(net, self.example, contender.method)
            self._prepared[key] = net.eval(), capture(net, self.example)
        return self._prepared[key]

    def _key(self, contender: Contender) -> str:
        adds = contender.method is not None and contender.method.kind == "tinytl"
        return contender.method.model_dump_json() if contender.method and adds else ""

    def of_ways(
        self, contender: Contender, ways: int, support: tuple[Array, Array]
    ) -> tuple[FewShot, Graph]:
        """The same for so many classes, those of a support set; the backbone is shared."""
        net, graph = self.prepared(contender)
        few = net.of_ways(ways)
        if contender.head == "cosine":
            return few, with_ways(graph, ways)
        refresh(few, support)
        linear = FewShot(net.backbone, linear_from_prototypes(few.head.prototypes)).eval()
        key = self._key(contender), ways
        if key not in self._linear:
            self._linear[key] = capture(linear, self.example)
        return linear, self._linear[key]

    @cached_property
    def hash(self) -> str:
        """Of the layers and the weights, but for the prototypes, which each task sets."""
        graph = with_ways(self.prepared(Contender())[1], 2)
        digest = hashlib.sha256(graph.hash.encode())
        for key, value in sorted(self.model.state_dict().items()):
            if key != "head.prototypes":
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class _Lab:
    """Learns tasks that have not been learned yet, and says so."""

    out: Path
    preprocess: Preprocess
    rule: EpisodeRule
    optimizer: Optimizer
    seed: int
    progress: bool
    _drawn: dict[tuple[Domain, int], _Drawn] = field(default_factory=dict, init=False)
    _prints: dict[tuple[Domain, int], str] = field(default_factory=dict, init=False)

    def rate(
        self,
        start: _Start,
        label: str,
        contender: Contender,
        validation: Mapping[str, Domain],
        count: int,
    ) -> tuple[float, dict[float, float]]:
        """The best rate of a contender, and the mean validation accuracy of each."""
        rates = contender.rates
        if len(rates) == 1 or contender.method is None:
            return rates[0], {}
        names = list(validation)
        tried = {}
        for rate in rates:
            runs = [
                self.run(
                    *(start, label, contender, rate, names[i % len(names)]),
                    *(validation[names[i % len(names)]], i // len(names)),
                    folder="validation",
                )
                for i in range(count)
            ]
            tried[rate] = float(np.mean([run.accuracy for run in runs]))
        best = max(rates, key=lambda r: tried[r])
        shown = ", ".join(f"{r:g}: {percent(a)}" for r, a in tried.items())
        self.say(f"{start.name}, {label}: rate {best:g} ({shown})")
        return best, tried

    def run(
        self,
        start: _Start,
        label: str,
        contender: Contender,
        rate: float,
        name: str,
        domain: Domain,
        index: int,
        folder: str = "tasks",
    ) -> TaskRun:
        """A task as a contender has learned it, from its file if there is one."""
        method = contender.method
        inputs = {
            "modicum": __version__,
            "model": start.hash,
            "method": method and method.model_dump(mode="json"),
            "tune": method and contender.tune.model_dump(mode="json"),
            "optimizer": method and self._optimizer(rate).model_dump(mode="json"),
            "preprocess": self.preprocess.model_dump(mode="json"),
            "images": self._print(domain, index),
            "seed": self.seed,
            "task": index,
        }
        if contender.head != "cosine":
            inputs["head"] = contender.head
        inputs = json.loads(json.dumps(inputs))
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        path = self.out / folder / name / f"{index:04d}-{digest[:16]}.json"
        run = _read(path, inputs)
        if run is None:
            run = self._learn(start, contender, rate, domain, index, inputs)
            write(path, (run.model_dump_json(indent=1) + "\n").encode())
            at = f", rate {rate:g}" if method else ""
            at += "" if folder == "tasks" else f" ({folder})"
            came = run.failed or f"{percent(run.accuracy)} in {duration(run.seconds)}"
            self.say(f"{start.name}, {label}, {name} {index}{at}: {came}")
        return run

    def _learn(
        self,
        start: _Start,
        contender: Contender,
        rate: float,
        domain: Domain,
        index: int,
        inputs: dict[str, Any],
    ) -> TaskRun:
        support, query = self._task(domain, index)
        ways = int(support[1].max()) + 1
        net, graph = start.of_ways(contender, ways, support)
        method, seed = contender.method, self.seed + index
        if method is None:
            refresh(net, support)
            run = TaskRun(inputs=inputs, ways=ways, accuracy=1 / ways)
            return self._judged(run, net, query)
        began = time.perf_counter()
        seen = None
        if isinstance(method, ObservingMethod):
            try:
                seen = observe_task(net, graph, method, support, contender.tune, seed=seed)
            except Diverged as error:
                return TaskRun(inputs=inputs, ways=ways, accuracy=1 / ways, failed=error.what)
        made = plan(graph, None, method, self._optimizer(rate), samples=seen)
        run = TaskRun(
            inputs=inputs,
            ways=ways,
            accuracy=1 / ways,
            selection=time.perf_counter() - began,
            cost=backward_cost(graph, made.selection, made.optimizer),
            plan_saved=made.cost.saved,
            plan_dynamic=memory_of(made).dynamic,
            plan_ram=made.cost.ram,
            layers={t.param: t.size for t in made.program.trained},
        )
        unlabelled = query[0] if contender.tune.entropy else None
        try:
            tuned, learned = fine_tune(
                net, made, support, contender.tune, seed=seed, queries=unlabelled
            )
        except Diverged as error:
            return run.model_copy(update={"failed": error.what})
        ends = (learned.losses[0], learned.losses[-1]) if learned.losses else None
        run = run.model_copy(update={"losses": ends, "seconds": learned.seconds})
        return self._judged(run, tuned, query)

    def _judged(self, run: TaskRun, net: nn.Module, query: tuple[Array, Array]) -> TaskRun:
        """The run with its accuracy, or with why it has none."""
        try:
            return run.model_copy(update={"accuracy": task_accuracy(net, query)})
        except Diverged as error:
            return run.model_copy(update={"failed": error.what})

    def _optimizer(self, rate: float) -> Optimizer:
        return self.optimizer.model_copy(update={"lr": rate})

    def _task(self, domain: Domain, index: int) -> _Drawn:
        """Support and query as arrays; the last ones are kept, methods come one after another."""
        key = (domain, index)
        if key not in self._drawn:
            if sum(x.nbytes for task in self._drawn.values() for x, _ in task) > KEEP_BYTES:
                self._drawn.clear()
            task = draw_task(
                domain.dataset, self.rule, seed=self.seed, index=index, query=domain.query,
                apart=domain.apart,
            )  # fmt: skip
            parts = (task.support, task.query)
            self._drawn[key] = tuple(arrays(part, self.preprocess) for part in parts)
        return self._drawn[key]

    def _print(self, domain: Domain, index: int) -> str:
        """A fingerprint of all pixels and labels of a task."""
        key = (domain, index)
        if key not in self._prints:
            digest = hashlib.sha256()
            for x, y in self._task(domain, index):
                digest.update(f"{x.shape}".encode() + np.ascontiguousarray(x, "<f4").tobytes())
                digest.update(np.ascontiguousarray(y, "<i8").tobytes())
            self._prints[key] = digest.hexdigest()
        return self._prints[key]

    def say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)


def _reason(error: ModicumError) -> str:
    more = [line for key in ("why", "where") for line in error.details.get(key, ())]
    return "; ".join([error.what, *more])


def _read(path: Path, inputs: dict[str, Any]) -> TaskRun | None:
    """The run in a file, if it is whole and of the same inputs."""
    try:
        run = TaskRun.model_validate_json(path.read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return run if run.inputs == inputs else None


def _row(
    model: str,
    label: str,
    contender: Contender,
    rate: float,
    tried: Mapping[float, float],
    by_domain: Mapping[str, Sequence[TaskRun]],
) -> TaskRow:
    runs = [run for each in by_domain.values() for run in each]
    costs = [run.cost for run in runs if run.cost is not None]
    failed = {
        f"{d} {i}": run.failed
        for d, each in by_domain.items()
        for i, run in enumerate(each)
        if run.failed is not None
    }
    return TaskRow(
        model=model,
        label=label,
        method=contender.method,
        head=contender.head,
        tune=contender.tune.model_dump(mode="json") if contender.method else None,
        rate=rate if contender.method else None,
        tried={f"{r:g}": a for r, a in tried.items()},
        accuracies={d: tuple(run.accuracy for run in each) for d, each in by_domain.items()},
        trained=max((c.updated for c in costs), default=0),
        saved=max(run.plan_saved for run in runs),
        dynamic=max(run.plan_dynamic for run in runs),
        ram=max(run.plan_ram for run in runs),
        memory_one=max((c.memory for c in costs), default=0),
        batch=contender.batch if contender.method else 1,
        memory=max((c.batch_memory(contender.batch) for c in costs), default=0),
        macs=max((c.macs for c in costs), default=0),
        seconds=float(np.mean([run.seconds for run in runs])),
        selection=float(np.mean([run.selection for run in runs])),
        failed=failed,
    )


__all__ = ["Contender", "Domain", "TaskComparison", "TaskRow", "TaskRun", "compare_on_tasks"]
