"""Meta-training: tasks drawn from a labelled dataset, an outer step after each few of them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from modicum.errors import InvalidInput, UsageError
from modicum.heads import FewShot
from modicum.meta.config import MetaTrace, MetaTrain, Scores
from modicum.meta.files import check_inputs, read_state, weights_hash, write_state
from modicum.meta.learner import GradientLearner, Learner
from modicum.meta.plans import method_of
from modicum.meta.pmeta import PMeta, PMetaLearner
from modicum.meta.rules import AnyRule
from modicum.meta.sources import Drawn, Episodes, TaskSource
from modicum.tasks import Labelled, Preprocess
from modicum.units import percent

TEST_SEED, VALIDATION_SEED = 2_718_281, 1_618_033
"""Of tasks to be judged on, and of those to choose an epoch by: none that are trained on."""


def metatrain(
    net: nn.Module,
    dataset: Labelled | TaskSource,
    preprocess: Preprocess | None = None,
    config: MetaTrain | None = None,
    *,
    out: str | Path,
    validation: Labelled | TaskSource | None = None,
    test: Labelled | TaskSource | None = None,
    test_tasks: int = 600,
    progress: bool = False,
) -> MetaTrace:
    """Meta-train `net` in place, and return how it went.

    Tasks are drawn from a labelled dataset, whose images `preprocess` makes fit, or come from a
    TaskSource.  For ProtoNet `net` is a `few_shot` model, for the other rules one with a head of
    as many outputs as a task has ways, or as its targets.

    `out` gets checkpoint.pt after each epoch, log.jsonl, and at the end weights.pt, the state dict
    of `net`, and learner.pt, with the step sizes and whatever else the rule has learned beside it
    (`load_learner`), for a rule with gradient steps also method.json, the method that a plan of
    them is made with (`method_of`), where one can say it.  Called again with the same arguments it
    goes on from the checkpoint.  Under torchrun each process takes tasks of its own and the
    gradients are averaged (DDP; gloo on CPUs, nccl on GPUs).

    `test`: what was kept is judged on `test_tasks` tasks of it, with a 95 % interval.  Raises
    InvalidInput for a checkpoint of another training, and UsageError for a net that does not go
    with the rule.
    """
    config = config or MetaTrain()
    keep_freed_memory()
    rank, world = _processes(next(net.parameters()).device)
    sources = [_source(given, preprocess, config) for given in (dataset, validation, test)]
    assert sources[0] is not None
    run = _Run(net, sources[0], config, Path(out), sources[1], rank, world, progress)
    for source in sources:  # says now what does not fit
        if source is not None:
            _check_outputs(net, source)
    _check_sizes(sources[0], config)
    trace = run.train()
    if sources[2] is not None:
        trace = trace.model_copy(update={"test": run.test(sources[2], test_tasks)})
    return trace


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what PyTorch frees: it asks for the same sizes in every step.

    Large tensors would go back to the system otherwise and be mapped and cleared again, up to a
    sixth of the time of an update of MAML.  Holds for the whole process; without glibc nothing
    happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 1 << 25)  # as large as it takes
    mallopt(trim_threshold, (1 << 31) - 1)


def load_learner(net: nn.Module, path: str | Path) -> tuple[AnyRule, Learner]:
    """The rule and the learner that `metatrain` wrote to learner.pt, around a copy of `net`.

    Raises InvalidInput for a file that is broken, or of another rule or model.
    """
    state = read_state(Path(path), next(net.parameters()).device, "another file")
    try:
        rule = MetaTrain.model_validate({"rule": state["rule"]}).rule
        learner = rule.learner(net)
        learner.load_state_dict(state["learner"])
    except (KeyError, TypeError, ValidationError, RuntimeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInput(
            f"{path} is of another rule or model", why=why, hint="the net that it was trained with"
        ) from None
    return rule, learner.eval()


def judge(
    learner: Learner,
    source: TaskSource,
    tasks: int = 600,
    *,
    first: int = 0,
    every: int = 1,
    seed: int = TEST_SEED,
) -> list[float]:
    """The scores of a learner on tasks `first`, `first` + `every`, .. below `tasks` of a source.

    The accuracy for labels, the mean squared error for targets of floats.
    """
    learner.eval()
    device = next(learner.parameters()).device
    scores = []
    with torch.no_grad():
        for index in range(first, tasks, every):
            drawn = tensors([source.draw(seed, index)], device)
            loss, outputs = learner(*drawn)
            scores.append(_score(loss, outputs, drawn[3]))
    return scores


class _Run:
    """One training in one process; used once."""

    def __init__(
        self,
        net: nn.Module,
        source: TaskSource,
        config: MetaTrain,
        folder: Path,
        validation: TaskSource | None,
        rank: int,
        world: int,
        progress: bool,
    ) -> None:
        self.net, self.source, self.config = net, source, config
        self.folder, self.validation = folder, validation
        self.rank, self.world, self.progress = rank, world, progress and rank == 0
        self.device = next(net.parameters()).device
        self.inputs: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "data": source.fingerprint(),
            "validation": None if validation is None else validation.fingerprint(),
            "validation_seed": None if validation is None else VALIDATION_SEED,
            "processes": world,
            "weights": weights_hash(net),
        }
        self.inputs = json.loads(json.dumps(self.inputs))
        self.learner = config.rule.learner(net).to(self.device)
        self.optimizer = _optimizer(config, self.learner)
        self.wrapped: nn.Module = self.learner
        if world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.learner, device_ids=ids)
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.labels = _of_labels(source)

    def train(self) -> MetaTrace:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        board = _tensorboard(self.folder) if self.rank == 0 else None
        for epoch in range(len(self.log), self.config.epochs):
            start = time.perf_counter()
            with self.own_draws(epoch):
                entry = self.epoch(epoch)
            self.share_buffers()
            if self.validation is not None:
                entry["validation"] = self.validate()
            self.seconds += time.perf_counter() - start
            entry["seconds"] = self.seconds
            if not self.learner.ready:
                entry["ready"] = False
            self.log.append(entry)
            if self.best_epoch() == epoch:
                self.best = {k: v.detach().clone() for k, v in self.learner.state_dict().items()}
            if self.rank == 0:
                self.save()
                self.say(entry)
                for key, value in entry.items():
                    if board is not None and key not in ("epoch", "ready"):
                        board.add_scalar(key, value, epoch)
        if board is not None:
            board.close()
        self.wrapped = self.learner  # what DDP holds of the group must not outlive it
        self.learner.load_state_dict(self.best)
        self.learner.write_to(self.net)
        if self.rank == 0:
            write_state(self.folder / "weights.pt", self.net.state_dict())
            rule = self.config.rule.model_dump(mode="json")
            state = {"rule": rule, "learner": self.learner.state_dict()}
            write_state(self.folder / "learner.pt", state)
            self.write_method()
        return MetaTrace(
            losses=tuple(e["loss"] for e in self.log),
            accuracies=tuple(e["accuracy"] for e in self.log if "accuracy" in e),
            validation=tuple(e["validation"] for e in self.log if "validation" in e),
            best=self.best_epoch(),
            seconds=self.seconds,
        )

    def write_method(self) -> None:
        """What a plan is made with, where one says what the rule has learned."""
        if not isinstance(self.learner, GradientLearner) or not self.learner.judged:
            return
        path = self.folder / "method.json"
        path.unlink(missing_ok=True)  # of an earlier end
        try:
            path.write_text(method_of(self.learner).model_dump_json(indent=1) + "\n")
        except UsageError as error:
            print(f"no {path}: {error.what}", file=sys.stderr, flush=True)

    def best_epoch(self) -> int:
        """The one with the best validation score, if that counts, of those that keep all limits;
        without validation the last."""
        if self.validation is None:
            return len(self.log) - 1
        sign = 1 if self.labels else -1
        able = [i for i, entry in enumerate(self.log) if entry.get("ready", True)]
        return max(
            able or range(len(self.log)), key=lambda i: (sign * self.log[i]["validation"], i)
        )

    def epoch(self, epoch: int) -> dict[str, Any]:
        config = self.config
        self.learner.train()
        per_epoch = config.episodes // config.tasks
        losses, scores = [], []
        for step in _bar(range(per_epoch), f"epoch {epoch + 1}/{config.epochs}", self.progress):
            update = epoch * per_epoch + step
            self.learner.progress = update / config.updates
            for group in self.optimizer.param_groups:
                group["lr"] = config.rate_at(update)
            for first in range(0, config.tasks, config.together):
                numbers = [
                    (update * config.tasks + first + i) * self.world + self.rank
                    for i in range(config.together)
                ]
                drawn = tensors(
                    [self.source.draw(config.seed, n, train=True) for n in numbers], self.device
                )
                with self.averaging(first + config.together == config.tasks):
                    loss, outputs = self.wrapped(*drawn)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise InvalidInput(
                            f"the loss is not finite in update {update}",
                            hint="a smaller rate, of the outer or of the inner rule",
                        )
                    (self.whole(loss) * (config.together / config.tasks)).backward()
                losses.append(value)
                scores.append(_score(loss, outputs, drawn[3]))
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.learner.progress = (update + 1) / config.updates
            self.learner.after_update(*(part[-1] for part in drawn))
        loss_, score = self.mean([float(np.mean(losses)), float(np.mean(scores))])
        return {"epoch": epoch, "loss": loss_, **({"accuracy": score} if self.labels else {})}

    def whole(self, loss: Tensor) -> Tensor:
        """The loss with a gradient of 0 for attention of layers that no step updates any more: DDP
        waits for one of every parameter."""
        if self.world == 1 or not isinstance(self.learner, PMetaLearner):
            return loss
        idle = [p.sum() for p in self.learner.attention.parameters()]
        return loss + 0.0 * torch.stack(idle).sum() if idle else loss

    def averaging(self, now: bool) -> AbstractContextManager[None]:
        """Gradients are averaged over all processes once for each update, in its last pass."""
        if now or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def validate(self) -> float:
        assert self.validation is not None
        return self._judged(self.validation, self.config.validation, VALIDATION_SEED)[0]

    def test(self, source: TaskSource, tasks: int) -> Scores:
        """Over all processes; the same in each."""
        mean, spread = self._judged(source, tasks, TEST_SEED)
        return Scores(tasks=tasks, mean=mean, interval=spread, labels=self.labels)

    def _judged(self, source: TaskSource, tasks: int, seed: int) -> tuple[float, float]:
        """(mean, half of the 95 % interval of it)."""
        part = {"first": self.rank, "every": self.world}
        scores = np.array(judge(self.learner, source, tasks, **part, seed=seed))
        total, squares, n = self.mean(
            [float(scores.sum()), float((scores**2).sum()), float(len(scores))]
        )
        mean = total / n
        count = n * self.world
        spread = max(0.0, squares / n - mean * mean) * count / max(1.0, count - 1)
        return mean, 1.96 * math.sqrt(spread / count)

    def mean(self, values: list[float]) -> list[float]:
        """Over all processes."""
        if self.world == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return [v / self.world for v in t.tolist()]

    @contextmanager
    def own_draws(self, epoch: int) -> Iterator[None]:
        """What PyTorch draws in an epoch, for dropout, depends on nothing before it."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash((self.config.seed, epoch, self.rank)) % (1 << 63))
            yield

    def share_buffers(self) -> None:
        """Statistics that norms followed are those of the first process for all."""
        if self.world > 1:
            for buffer in self.learner.buffers():
                dist.broadcast(buffer, 0)

    # ---- files ----

    def save(self) -> None:
        state = {
            "inputs": self.inputs,
            "log": self.log,
            "seconds": self.seconds,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        write_state(self.folder / "checkpoint.pt", state)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        (self.folder / "log.jsonl").write_text(lines)

    def resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = read_state(path, self.device, "another --out, or delete it")
        try:
            known = {**state["inputs"]}
            log, best, seconds = list(state["log"]), dict(state["best"]), float(state["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"cannot read {path}", why=repr(error), hint="another --out, or delete it"
            ) from None
        check_inputs(path, known, self.inputs)
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log, self.best, self.seconds = log, best, seconds
        if self.progress:
            print(f"goes on after epoch {len(self.log)} of {path}", file=sys.stderr, flush=True)

    def say(self, entry: dict[str, Any]) -> None:
        if self.progress:
            held = entry.get("validation")
            shown = percent if self.labels else "{:.3f}".format
            more = "" if held is None else f", validation {shown(held)}"
            accuracy = f", accuracy {percent(entry['accuracy'])}" if self.labels else ""
            print(
                f"epoch {entry['epoch'] + 1}/{self.config.epochs}: loss {entry['loss']:.3f}"
                f"{accuracy}{more}",
                file=sys.stderr,
                flush=True,
            )


def _processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size), with the process group that torchrun describes.

    A group is made once and kept for the next training: one that is made again would meet what the
    first has left in the store.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise UsageError("WORLD_SIZE is set, MASTER_ADDR is not", hint="torchrun sets both")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # of what is left of DDP, whose threads end with it
        dist.destroy_process_group()


def _source(
    given: Labelled | TaskSource | None, preprocess: Preprocess | None, config: MetaTrain
) -> TaskSource | None:
    if not isinstance(given, Labelled):
        return given
    if preprocess is None:
        raise UsageError("images need a Preprocess", hint="metatrain(net, dataset, Preprocess(..))")
    return Episodes(given, preprocess, config.episode, config.augment)


def _check_sizes(source: TaskSource, config: MetaTrain) -> None:
    """Raise UsageError for tasks of several sizes that are to be computed at once, or by a rule
    whose limit is that of one size."""
    if not isinstance(source, Episodes) or len(set(source.rule.range)) == 1:
        return
    tasks = "tasks of {} to {} ways".format(*source.rule.range)
    if config.together > 1:
        hint = "--together 1, or one number of --ways"
        raise UsageError(f"{tasks} are not computed at once", hint=hint)
    if isinstance(config.rule, PMeta):
        why = "its limit is on the memory of a step, which depends on their number"
        raise UsageError(f"p-Meta does not take {tasks}", why=why, hint="one number of --ways")


def _of_labels(source: TaskSource) -> bool:
    """Whether tasks are of labels, not of float targets."""
    return not np.issubdtype(source.draw(0, 0)[1].dtype, np.floating)


def _check_outputs(net: nn.Module, source: TaskSource) -> None:
    """Raise UsageError where the net has too few outputs for the labels of the tasks."""
    if isinstance(net, FewShot) or not _of_labels(source):
        return
    xs, ys, _, _ = source.draw(0, 0)
    training, device = net.training, next(net.parameters()).device
    with torch.no_grad():
        outputs = net.eval()(torch.from_numpy(xs[:1]).to(device)).shape[-1]
    net.train(training)
    ways = int(ys.max()) + 1
    if isinstance(source, Episodes):  # up to the classes that there are
        ways = max(ways, min(source.rule.range[1], len(source.dataset.classes)))
    if outputs < ways:
        raise UsageError(
            f"the model has {outputs} outputs, and tasks have {ways} ways",
            hint="a head with an output for each way, or fewer --ways",
        )


def _optimizer(config: MetaTrain, learner: Learner) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(learner.parameters(), config.rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        learner.parameters(),
        config.rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def tensors(drawn: list[Drawn], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tasks of the same size, stacked: (t, n, ...), (t, n), (t, m, ...), (t, m)."""
    xs, ys, xq, yq = (
        torch.from_numpy(np.stack(parts)).to(device) for parts in zip(*drawn, strict=True)
    )
    return xs, ys, xq, yq


def _score(loss: Tensor, outputs: Tensor, answers: Tensor) -> float:
    if answers.is_floating_point():
        return float(loss.detach())
    return float((outputs.argmax(-1) == answers).float().mean())


def _tensorboard(folder: Path) -> Any:
    """A writer if TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _bar(steps: range, title: str, show: bool) -> Iterator[int]:
    if not (show and sys.stderr.isatty()):
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, title, console=Console(stderr=True), transient=True)
