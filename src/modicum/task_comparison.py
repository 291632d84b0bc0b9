"""Methods on the same few-shot tasks: accuracy, backward memory and work, selection and time.

Every task that a method has learned is one JSON file that says all it depends on.  A rerun learns
only what is missing, and several processes may work in one folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import nn

from modicum import __version__
from modicum.adapt import Diverged
from modicum.backward_cost import backward_cost
from modicum.capture import capture
from modicum.errors import UsageError
from modicum.fewshot import Array, FineTune, fine_tune, task_accuracy
from modicum.graph import Frozen, Graph
from modicum.heads import CosineHead, FewShot, few_shot, with_ways
from modicum.lite import prepare_model
from modicum.methods import AnyMethod, ObservingMethod
from modicum.observe import observe
from modicum.optim import SGD, Adam, Optimizer
from modicum.plan import plan
from modicum.report.tasks import TaskComparison, TaskRow, summarise
from modicum.tasks import (
    EpisodeRule,
    FixedEpisodes,
    Labelled,
    Preprocess,
    arrays,
    draw_task,
    pseudo_query,
)
from modicum.units import duration, percent

VERSION: Literal[1] = 1
OBSERVED = 1_000_000
"""The step whose pseudo-queries a method scores its channels on: none of those it learns from."""

Rate = Annotated[float, Field(gt=0, lt=float("inf"))]


class Contender(Frozen):
    """A method in a comparison on tasks: what it trains, how, and the rates to choose from.

    Without a method nothing is trained: prototypes of the support set alone.  `batch` is the
    number of samples at once by which the papers' convention counts its memory.
    """

    method: AnyMethod | None = None
    tune: FineTune = FineTune()
    rates: tuple[Rate, ...] = (1e-3,)
    batch: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Domain:
    """Where tasks come from: see `draw_task`."""

    dataset: Labelled
    query: Labelled | None = None
    apart: bool = False

    @cached_property
    def print(self) -> dict[str, Any]:
        """What it is, without decoding the images: names and labels in order."""
        digest = hashlib.sha256()
        for part in (self.dataset, self.query):
            if part is not None:
                digest.update(json.dumps([part.classes, part.names]).encode())
                digest.update(np.ascontiguousarray(part.labels, "<i8").tobytes())
        return {"images": len(self.dataset), "sha256": digest.hexdigest(), "apart": self.apart}


class TaskRun(Frozen):
    """A task that a method has learned; bytes and MACs of its backward pass as in the papers.

    seconds: of the fine-tuning; selection: of looking at the samples and of making the plan.
    """

    version: Literal[1] = VERSION
    inputs: dict[str, Any]
    accuracy: float = 0.0
    ways: int = 0
    support: int = 0
    losses: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    selection: float = 0.0
    trained: int = 0
    saved: int = 0
    memory: int = 0
    macs: int = 0
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

    `out` gets a file for each task and method.  Raises InvalidInput for data that does not fit,
    UsageError where a method does not apply to a model.
    """
    if not models or not contenders or not domains or tasks < 1:
        raise UsageError("nothing to compare", hint="a model, a method, a domain and a task")
    several = [label for label, c in contenders.items() if len(c.rates) > 1]
    if several and not validation:
        raise UsageError(
            f"{several[0]} has several rates, and there is nothing to choose by",
            hint="validation={name: Domain(...)} with classes that are not tested",
        )
    lab = _Lab(
        Path(out), preprocess, rule or FixedEpisodes(ways=(5, 10), shots=5, queries=10),
        optimizer or Adam(), seed, progress,
    )  # fmt: skip
    rows = []
    for name, model in models.items():
        start = _Start(model, preprocess, name)
        for label, contender in contenders.items():
            rate, tried = lab.rate(start, label, contender, validation or {}, validation_tasks)
            by_domain = {
                d: [lab.run(start, label, contender, rate, d, domain, i) for i in range(tasks)]
                for d, domain in domains.items()
            }
            rows.append(_row(name, label, contender, rate, tried, by_domain))
    made = summarise(rows)
    made.save(Path(out))
    return made


class _Start:
    """A model that all methods start from, for any number of ways."""

    def __init__(self, model: nn.Module, preprocess: Preprocess, name: str) -> None:
        self.name = name
        self.model = model if isinstance(model, FewShot) else few_shot(model, 2)
        self.example = torch.zeros(1, *preprocess.shape)
        self._prepared: dict[str, tuple[FewShot, Graph]] = {}

    def prepared(self, contender: Contender) -> tuple[FewShot, Graph]:
        """The net that a method trains, and its graph; captured once."""
        key = "" if contender.method is None else contender.method.model_dump_json()
        key = key if contender.method is not None and contender.method.kind == "tinytl" else ""
        if key not in self._prepared:
            net = self.model
            if contender.method is not None:
                net = prepare_model(net, self.example, contender.method)
            net.eval()
            self._prepared[key] = net, capture(net, self.example)
        return self._prepared[key]

    def of_ways(self, contender: Contender, ways: int) -> tuple[FewShot, Graph]:
        """The same for so many classes; the backbone is shared."""
        net, graph = self.prepared(contender)
        if not isinstance(net.head, CosineHead):
            raise UsageError("tasks need a cosine head", hint="few_shot(model, ways)")
        width = net.head.prototypes.shape[1]
        head = CosineHead(width, ways, float(net.head.scale), float(net.head.bias))
        return FewShot(net.backbone, head).eval(), with_ways(graph, ways)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256()
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
    _images: dict[tuple[str, int], Any] = field(default_factory=dict, init=False)

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
        inputs = {
            "modicum": __version__,
            "model": start.hash,
            "method": contender.method and contender.method.model_dump(mode="json"),
            "tune": contender.tune.model_dump(mode="json"),
            "optimizer": self.optimizer.model_copy(update={"lr": rate}).model_dump(mode="json"),
            "preprocess": self.preprocess.model_dump(mode="json"),
            "rule": self.rule.model_dump(mode="json"),
            "domain": domain.print,
            "seed": self.seed,
            "task": index,
        }
        inputs = json.loads(json.dumps(inputs))
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        path = self.out / folder / name / f"{index:04d}-{digest[:16]}.json"
        run = _read(path, inputs)
        if run is None:
            run = self._learn(start, contender, rate, name, domain, index, inputs)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(run.model_dump_json(indent=1) + "\n")
            part.replace(path)
            came = run.failed or f"{percent(run.accuracy)} in {duration(run.seconds)}"
            self.say(f"{start.name}, {label}, {name} {index}, rate {rate:g}: {came}")
        return run

    def _learn(
        self,
        start: _Start,
        contender: Contender,
        rate: float,
        name: str,
        domain: Domain,
        index: int,
        inputs: dict[str, Any],
    ) -> TaskRun:
        support, query = self._task(name, domain, index)
        ways = int(support[1].max()) + 1
        facts: dict[str, Any] = {"inputs": inputs, "ways": ways, "support": len(support[0])}
        net, graph = start.of_ways(contender, ways)
        optimizer = self.optimizer.model_copy(update={"lr": rate})
        if contender.method is None:
            net.head.refresh(_features(net, support[0]), torch.from_numpy(support[1]))
            return TaskRun(**facts, accuracy=task_accuracy(net, query))
        began = time.perf_counter()
        seen = None
        if isinstance(contender.method, ObservingMethod):
            seed = self.seed + index
            asked = pseudo_query(support[0], contender.tune, seed=seed, step=OBSERVED)
            method = contender.method
            seen = observe(net, graph, method, support, queries=(asked, support[1]))
        made = plan(graph, None, contender.method, optimizer, samples=seen)
        facts["selection"] = time.perf_counter() - began
        cost = backward_cost(graph, made.selection, optimizer)
        facts |= {
            "trained": cost.updated,
            "saved": cost.saved,
            "memory": cost.batch_memory(contender.batch),
            "macs": cost.macs,
            "plan_saved": made.cost.saved,
            "plan_dynamic": made.cost.arena - made.cost.trained_bytes - made.cost.optimizer_bytes,
            "plan_ram": made.cost.ram,
            "layers": {t.param: t.size for t in made.program.trained},
        }
        try:
            tuned, learned = fine_tune(
                net, made, support, contender.tune, seed=self.seed + index, queries=query[0]
            )
        except Diverged as error:
            return TaskRun(**facts, accuracy=1 / ways, failed=error.what)
        return TaskRun(
            **facts,
            accuracy=task_accuracy(tuned, query),
            losses=(learned.losses[0], learned.losses[-1]) if learned.losses else (0.0, 0.0),
            seconds=learned.seconds,
        )

    def _task(self, name: str, domain: Domain, index: int) -> Any:
        """Support and query as arrays; the last ones are kept, methods come one after another."""
        key = (domain.print["sha256"], index)
        if key not in self._images:
            if len(self._images) > 256:
                self._images.clear()
            task = draw_task(
                domain.dataset, self.rule, seed=self.seed, index=index, query=domain.query,
                apart=domain.apart,
            )  # fmt: skip
            parts = (task.support, task.query)
            self._images[key] = tuple(arrays(part, self.preprocess) for part in parts)
        return self._images[key]

    def say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)


def _features(net: FewShot, x: Array) -> torch.Tensor:
    with torch.no_grad():
        parts = [net.backbone(torch.from_numpy(x[i : i + 64])) for i in range(0, len(x), 64)]
    return torch.cat(parts)


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

    def mean(key: str) -> float:
        return float(np.mean([getattr(run, key) for run in runs]))

    def most(key: str) -> int:
        return int(max(getattr(run, key) for run in runs))

    failed = sum(run.failed is not None for run in runs)
    return TaskRow(
        model=model,
        label=label,
        method=contender.method,
        rate=rate,
        tried={f"{r:g}": a for r, a in tried.items()},
        accuracies={d: tuple(run.accuracy for run in each) for d, each in by_domain.items()},
        batch=contender.batch,
        **{key: most(key) for key in ("trained", "saved", "memory", "macs")},
        **{key: most(key) for key in ("plan_saved", "plan_dynamic", "plan_ram")},
        seconds=mean("seconds"),
        selection=mean("selection"),
        failed=failed,
    )


__all__ = ["Contender", "Domain", "TaskComparison", "TaskRow", "TaskRun", "compare_on_tasks"]
