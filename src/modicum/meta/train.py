"""Meta-training: tasks drawn from a labelled dataset, an outer step after each few of them."""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from modicum.errors import InvalidInput, UsageError
from modicum.graph import Frozen
from modicum.heads import FewShot
from modicum.meta.protonet import ProtoNet, ProtoNetLoss
from modicum.tasks import Augment, FixedEpisodes, Labelled, Preprocess, Task, draw_task, take
from modicum.units import duration, percent

Rate = Annotated[float, Field(ge=0, lt=float("inf"))]
VALIDATION_SEED = 2_718_281
"""Of the validation tasks: none of those that are trained on."""


class MetaTrain(Frozen):
    """How long, how fast, on what tasks.  The defaults are those of P>M>F and TinyTrain.

    `epochs` of `episodes` tasks each, `tasks` of which make one update (per process).  The rate
    rises linearly from `warmup_rate` to `rate` over `warmup` epochs, then falls as a cosine to
    `final_rate`.  SGD with momentum.  After every epoch the mean accuracy over `validation` tasks
    of other classes is taken, if there is such a set, and the best weights are kept.

    `norms`: "frozen" leaves batch norms with the statistics that they came with, as on a device
    that sees one sample at a time; "batch" uses and follows those of each task.
    """

    epochs: Annotated[int, Field(ge=1)] = 100
    episodes: Annotated[int, Field(ge=1)] = 2000
    tasks: Annotated[int, Field(ge=1)] = 1
    rule: ProtoNet = ProtoNet()
    episode: FixedEpisodes = FixedEpisodes(ways=5, shots=5, queries=15)
    augment: Augment | None = None
    rate: Rate = 5e-5
    warmup_rate: Rate = 1e-6
    final_rate: Rate = 1e-6
    warmup: Annotated[float, Field(ge=0)] = 5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0
    validation: Annotated[int, Field(ge=1)] = 100
    norms: Literal["frozen", "batch"] = "frozen"
    seed: int = 0

    @model_validator(mode="after")
    def _long_enough(self) -> MetaTrain:
        if self.warmup >= self.epochs and self.warmup:
            raise ValueError(f"{self.warmup} epochs of warm-up do not fit in {self.epochs}")
        if self.episodes % self.tasks:
            raise ValueError(f"{self.episodes} episodes are not whole updates of {self.tasks}")
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
    """What came of it, one entry per epoch; `best` is the epoch whose weights were kept."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    validation: tuple[float, ...]
    best: int
    seconds: float

    def __str__(self) -> str:
        text = f"{len(self.losses)} epochs in {duration(self.seconds)}, "
        text += f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}"
        if self.validation:
            held = percent(self.validation[self.best])
            text += f"; kept: epoch {self.best + 1}, validation accuracy {held}"
        return text


def metatrain(
    net: FewShot,
    dataset: Labelled,
    preprocess: Preprocess,
    config: MetaTrain | None = None,
    *,
    out: str | Path,
    validation: Labelled | None = None,
    progress: bool = False,
) -> MetaTrace:
    """Meta-train `net` in place, and return how it went.

    `out` gets checkpoint.pt after each epoch, log.jsonl, and at the end weights.pt, the state dict
    of `net`.  Called again with the same arguments it goes on from the checkpoint.  Under torchrun
    each process takes tasks of its own and the gradients are averaged (DDP; gloo on CPUs, nccl on
    GPUs).  Raises InvalidInput for a checkpoint of another training.
    """
    config = config or MetaTrain()
    rank, world = _processes(next(net.parameters()).device)
    run = _Run(net, dataset, preprocess, config, Path(out), validation, rank, world, progress)
    return run.train()


class _Run:
    """One training in one process; used once."""

    def __init__(
        self,
        net: FewShot,
        dataset: Labelled,
        preprocess: Preprocess,
        config: MetaTrain,
        folder: Path,
        validation: Labelled | None,
        rank: int,
        world: int,
        progress: bool,
    ) -> None:
        self.net, self.dataset, self.preprocess, self.config = net, dataset, preprocess, config
        self.folder, self.validation = folder, validation
        self.rank, self.world, self.progress = rank, world, progress and rank == 0
        self.device = next(net.parameters()).device
        self.loss = ProtoNetLoss(config.rule, net)
        self.optimizer = torch.optim.SGD(
            self.loss.parameters(),
            config.rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.wrapped: nn.Module = self.loss
        if world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.loss, device_ids=ids)
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.inputs: dict[str, Any] = {
            "config": config.model_dump(mode="json"),
            "preprocess": preprocess.model_dump(mode="json"),
            "data": _fingerprint(dataset),
            "validation": None if validation is None else _fingerprint(validation),
            "processes": world,
            "weights": _weights_hash(net.backbone),
        }
        self.inputs = json.loads(json.dumps(self.inputs))

    def train(self) -> MetaTrace:
        self.folder.mkdir(parents=True, exist_ok=True)
        for dataset in (self.dataset, self.validation):  # says now what does not fit
            if dataset is not None:
                draw_task(dataset, self.config.episode, seed=0, index=0)
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
            self.log.append(entry)
            if self.best_epoch() == epoch:
                self.best = {k: v.detach().clone() for k, v in self.loss.state_dict().items()}
            if self.rank == 0:
                self.save()
                self.say(entry)
                for key, value in entry.items():
                    if board is not None and key != "epoch":
                        board.add_scalar(key, value, epoch)
        if board is not None:
            board.close()
        self.loss.load_state_dict(self.best)
        self.loss.write_to(self.net)
        if self.rank == 0:
            _write(self.folder / "weights.pt", self.net.state_dict())
        return MetaTrace(
            losses=tuple(e["loss"] for e in self.log),
            accuracies=tuple(e["accuracy"] for e in self.log),
            validation=tuple(e["validation"] for e in self.log if "validation" in e),
            best=self.best_epoch(),
            seconds=self.seconds,
        )

    def best_epoch(self) -> int:
        """The one with the best validation accuracy; without validation the last."""
        if self.validation is None:
            return len(self.log) - 1
        return max(range(len(self.log)), key=lambda i: (self.log[i]["validation"], i))

    def epoch(self, epoch: int) -> dict[str, Any]:
        config = self.config
        self.loss.train(config.norms == "batch")
        per_epoch = config.episodes // config.tasks
        losses, hits = [], []
        for step in _bar(range(per_epoch), f"epoch {epoch + 1}/{config.epochs}", self.progress):
            update = epoch * per_epoch + step
            for group in self.optimizer.param_groups:
                group["lr"] = config.rate_at(update)
            for i in range(config.tasks):
                index = (update * config.tasks + i) * self.world + self.rank
                task = draw_task(self.dataset, config.episode, seed=config.seed, index=index)
                loss, hit = self.task(task, index)
                if not math.isfinite(float(loss.detach())):
                    raise InvalidInput(
                        f"the loss is not finite in update {update}", hint="a smaller rate"
                    )
                (loss / config.tasks).backward()
                losses.append(float(loss.detach()))
                hits.append(hit)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        loss, accuracy = self.mean([float(np.mean(losses)), float(np.mean(hits))])
        return {"epoch": epoch, "loss": loss, "accuracy": accuracy}

    def task(self, task: Task, index: int, train: bool = True) -> tuple[Tensor, float]:
        augment = self.config.augment if train else None
        parts = [
            take(part, self.preprocess, np.arange(len(part)), seed=self.config.seed, epoch=e,
                 augment=augment)
            for e, part in ((2 * index, task.support), (2 * index + 1, task.query))
        ]  # fmt: skip
        (xs, ys), (xq, yq) = ((torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts)
        yq = yq.to(self.device)
        net = self.wrapped if train else self.loss
        logits = net(xs.to(self.device), ys.to(self.device), xq.to(self.device))
        hits = float((logits.argmax(1) == yq).float().mean())
        return self.loss.loss(logits, yq), hits

    def validate(self) -> float:
        assert self.validation is not None
        self.loss.eval()
        hits = []
        with torch.no_grad():
            for index in range(self.rank, self.config.validation, self.world):
                rule = self.config.episode
                task = draw_task(self.validation, rule, seed=VALIDATION_SEED, index=index)
                hits.append(self.task(task, index, train=False)[1])
        total, n = self.mean([sum(hits), float(len(hits))])
        return total / n

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
            for buffer in self.loss.buffers():
                dist.broadcast(buffer, 0)

    # ---- files ----

    def save(self) -> None:
        state = {
            "inputs": self.inputs,
            "log": self.log,
            "seconds": self.seconds,
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        _write(self.folder / "checkpoint.pt", state)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
        (self.folder / "log.jsonl").write_text(lines)

    def resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            known = {**state["inputs"]}
            log, best, seconds = list(state["log"]), dict(state["best"]), float(state["seconds"])
        except Exception as error:  # whatever unpickling meets
            raise InvalidInput(
                f"cannot read {path}",
                why=(str(error).strip() or type(error).__name__).splitlines()[0],
                hint="another --out, or delete it",
            ) from None
        if known != self.inputs:
            odd = [k for k, given in self.inputs.items() if known.get(k) != given]
            raise InvalidInput(
                f"{path} is of another training",
                why=f"what differs: {', '.join(odd)}",
                hint="another --out, or the arguments that it was started with",
            )
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log, self.best, self.seconds = log, best, seconds
        if self.progress:
            print(f"goes on after epoch {len(self.log)} of {path}", file=sys.stderr, flush=True)

    def say(self, entry: dict[str, Any]) -> None:
        if self.progress:
            held = entry.get("validation")
            more = "" if held is None else f", validation {percent(held)}"
            print(
                f"epoch {entry['epoch'] + 1}/{self.config.epochs}: loss {entry['loss']:.3f}, "
                f"accuracy {percent(entry['accuracy'])}{more}",
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
        dist.destroy_process_group()


def _fingerprint(dataset: Labelled) -> dict[str, Any]:
    """What a dataset is, without decoding all of it: names, labels, an image of each class."""
    digest = hashlib.sha256(json.dumps([dataset.classes, dataset.names]).encode())
    digest.update(np.ascontiguousarray(dataset.labels, "<i8").tobytes())
    for first in np.unique(dataset.labels, return_index=True)[1]:
        digest.update(np.ascontiguousarray(dataset.image(int(first))).tobytes())
    return {"images": len(dataset), "sha256": digest.hexdigest()}


def _weights_hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()


def _write(path: Path, data: Any) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(data, part)
    part.replace(path)


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
