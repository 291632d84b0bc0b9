"""The small training loop on top of `apply`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from modicum.apply import Tuned, apply
from modicum.data import Data, check_data
from modicum.errors import Diverged, UsageError
from modicum.optim import SGD, Adam
from modicum.plan import Plan
from modicum.tasks import Labelled, Preprocess, Stream, batches
from modicum.trace import Trace

Schedule = Literal["constant", "cosine"]
Held = Data | tuple[Labelled, Preprocess]
EPOCHS = 10
EVALUATED = 32
"""Images of a dataset that are predicted together."""


def adapt(
    model: nn.Module,
    plan: Plan,
    data: Data | Stream,
    *,
    epochs: int | None = None,
    test: Held | None = None,
    seed: int = 0,
    schedule: Schedule = "constant",
    micro_batch: int = 1,
    record: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Trace:
    """Train under a plan and return the Trace; `model` is left alone.

    `data` and `test` are (inputs (n, ...), labels (n,)), or targets (n, outputs) for mse.  Each of
    the `epochs` (10) visits all samples in a new order drawn from `seed`; an update follows every
    ``plan.accumulate`` samples.  One sample at a time passes through the network, as on a board,
    so that memory is what the plan says; `micro_batch` > 1 trades memory for speed.

    `data` may also be a `tasks.Stream` of ``plan.accumulate`` augmented samples, whose batches
    pass at once and are followed by an update each; epochs and seed are then the stream's.  `test`
    may be a dataset with its Preprocess, which is read in batches.

    The learning rate follows `schedule` over all updates: "cosine" is
    ``lr (1 + cos(pi t / T)) / 2`` in update t = 0 .. T-1.  Each update is an inner step of the
    plan: parameters whose step size is 0 in it do not move, nor does their state.  With `record`
    the trace holds every trained slice after every step.  ``trace.state`` holds what was learned.
    Raises InvalidInput for data that does not fit the plan or is not finite, UsageError for a
    stream of other batches.
    """
    passes = _passes(plan, data, epochs, seed, micro_batch)
    tuned = apply(model, plan)
    before = None if test is None else evaluate(tuned, test)
    trace = train_passes(tuned, passes, schedule, record=record, progress=progress, on_step=on_step)
    if test is not None and before is not None:
        after = evaluate(tuned, test)
        trace.logits_before, trace.logits_after = before[0], after[0]
        trace.accuracy_before = accuracy(plan, *before)
        trace.accuracy_after = accuracy(plan, *after)
    return trace


def train_passes(
    tuned: Tuned,
    passes: Passes,
    schedule: Schedule = "constant",
    *,
    record: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Trace:
    """Train what `apply` made, in place, with all passes; the Trace has no predictions."""
    if schedule not in get_args(Schedule):
        raise UsageError(f"no schedule is called {schedule!r}", hint=", ".join(get_args(Schedule)))
    trace = Trace("torch", tuned.plan.hash, passes.seed, order=passes.order)
    recorded: dict[str, list[Any]] = {name: [] for name in tuned.moving}
    took = []
    start = time.perf_counter()
    with progress_bar(progress, passes.samples) as advance:
        for losses, seconds in _train(tuned, passes, schedule):
            took.append(seconds)
            for loss in losses:
                trace.losses.append(loss)
                if record:
                    for name, p in tuned.moving.items():
                        recorded[name].append(p.detach().cpu().numpy().copy())
                if on_step is not None:
                    on_step(len(trace.losses) - 1, loss)
                advance()
    trace.figures["seconds"] = time.perf_counter() - start
    if took:
        trace.figures["seconds_per_step"] = float(np.median(took))
    if record:
        trace.tensors = {name: np.stack(values) for name, values in recorded.items() if values}
    trace.state = {name: t.cpu().numpy() for name, t in tuned.learned().items()}
    return trace


@dataclass(frozen=True)
class Passes:
    """What goes through the network: `each()` yields (x, y, by, last), in order.

    The losses of the samples x, y are divided by `by`, and an update follows where `last`.
    `samples` and `updates` say how many there will be, `order` which samples, where it is known.
    """

    each: Callable[[], Iterator[tuple[Tensor, Tensor, int, bool]]]
    samples: int
    updates: int
    seed: int
    order: list[int]


def passes_of_samples(
    plan: Plan, data: Data, epochs: int = EPOCHS, seed: int = 0, micro_batch: int = 1
) -> Passes:
    """Samples in an order drawn from the seed; an update after every ``plan.accumulate``."""
    if epochs < 0 or micro_batch < 1:
        raise UsageError(
            f"cannot train for {epochs} epochs in micro-batches of {micro_batch}",
            hint="epochs from 0 and micro_batch from 1 on",
        )
    x, y = _tensors(plan, data)
    rng = np.random.default_rng(seed)
    order = [int(i) for _ in range(epochs) for i in rng.permutation(len(x))]
    plan.check_updates(len(order))

    def each() -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        done = 0
        while done < len(order):
            room = plan.accumulate - done % plan.accumulate
            rows = order[done : done + min(room, micro_batch)]
            done += len(rows)
            yield x[rows], y[rows], plan.accumulate, done % plan.accumulate == 0

    return Passes(each, len(order), len(order) // plan.accumulate, seed, order)


def passes_of_stream(plan: Plan, stream: Stream) -> Passes:
    """Each batch at once, followed by an update with the mean of its own gradients."""
    if stream.batch != plan.accumulate:
        raise UsageError(
            f"the stream has batches of {stream.batch}, the plan accumulates {plan.accumulate}",
            why="a board takes the samples of an update one by one, so the two are the same number",
            hint=f"plan(..., accumulate={stream.batch}), or a stream of batch {plan.accumulate}",
        )
    if stream.epochs is None:
        raise UsageError("the stream never ends", hint="Stream(..., epochs=10)")

    def each() -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        for batch in stream:
            x, y = _tensors(plan, batch)
            yield x, y, len(x), True

    at = stream.at
    updates = max(0, (stream.epochs - at.epoch) * stream.steps - at.step)
    return Passes(each, updates * stream.batch, updates, stream.seed, [])


def _passes(
    plan: Plan, data: Data | Stream, epochs: int | None, seed: int, micro_batch: int
) -> Passes:
    if not isinstance(data, Stream):
        return passes_of_samples(
            plan, data, EPOCHS if epochs is None else epochs, seed, micro_batch
        )
    if epochs is not None or seed or micro_batch != 1:
        raise UsageError(
            "epochs, seed and micro_batch do not go with a stream",
            hint="Stream(..., batch, epochs=..., seed=...)",
        )
    return passes_of_stream(plan, data)


def _train(tuned: Tuned, passes: Passes, schedule: Schedule) -> Iterator[tuple[list[float], float]]:
    """Yield (losses of the samples, seconds) per pass; its update has happened by then."""
    plan, device = tuned.plan, _device(tuned)
    optimizer = torch_optimizer(plan.optimizer, tuned, plan)
    optimizer.zero_grad(set_to_none=True)
    tuned.train()
    samples = updates = 0

    def learn(x: Tensor, y: Tensor, by: int) -> Tensor:
        losses = sample_losses(plan, tuned(x.to(device)), y.to(device))
        if not bool(torch.isfinite(losses).all()):
            raise Diverged(
                f"the loss is not finite at step {samples}", hint="a smaller learning rate"
            )
        (losses.sum() / by).backward()
        return losses

    for together in _by_update(passes) if plan.attends else ([one] for one in passes.each()):
        start = time.perf_counter()
        if tuned.attends and len(together) > 1:
            with tuned.look():
                for x, y, by, _ in together:
                    learn(x, y, by)
        for x, y, by, last in together:
            losses = learn(x, y, by)
            if last:
                update(optimizer, tuned, rate_factor(schedule, updates, passes.updates))
                updates += 1
            samples += len(x)
            yield losses.tolist(), time.perf_counter() - start
            start = time.perf_counter()


def _by_update(passes: Passes) -> Iterator[list[tuple[Tensor, Tensor, int, bool]]]:
    """The passes that an update follows, together."""
    together = []
    for one in passes.each():
        together.append(one)
        if one[3]:
            yield together
            together = []


def rate_factor(schedule: Schedule, update: int, updates: int) -> float:
    """What the learning rate is multiplied with in an update, counted from 0."""
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * update / updates)) / 2


def sample_losses(plan: Plan, logits: Tensor, y: Tensor) -> Tensor:
    """One loss per sample."""
    if plan.loss == "mse":
        return ((logits - y.reshape(logits.shape)) ** 2).flatten(1).mean(1)
    return nn.functional.cross_entropy(logits, y, reduction="none")


def torch_optimizer(config: SGD | Adam, tuned: Tuned, plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of a plan over the trained slices; `update` gives each its step size."""
    rates = {t.param: t.rates for t in plan.program.trained}
    groups: list[dict[str, Any]] = [
        {"params": [p], "rates": rates[name]} for name, p in tuned.trained.items()
    ]
    if isinstance(config, Adam):
        return torch.optim.Adam(
            groups, config.lr, config.betas, config.eps, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def update(optimizer: torch.optim.Optimizer, tuned: Tuned, factor: float = 1.0) -> None:
    """The update of an inner step, with step sizes times `factor`; the next one comes after it."""
    lr, step = tuned.plan.optimizer.lr, min(tuned.inner_step, tuned.plan.inner_steps - 1)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rates"][step] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tuned.inner_step += 1
    tuned.forget()


def evaluate(tuned: Tuned, held: Held) -> tuple[Any, Any]:
    """(outputs, labels or targets) of held-out samples, as numpy arrays."""
    first, second = held
    if not isinstance(first, Labelled):
        x, y = _tensors(tuned.plan, (first, second))
        return predict(tuned, x), y.numpy()
    outputs, labels = [], []
    for batch in batches(first, second, EVALUATED, shuffle=False):
        x, y = _tensors(tuned.plan, batch)
        outputs.append(predict(tuned, x))
        labels.append(y.numpy())
    return np.concatenate(outputs), np.concatenate(labels)


def predict(module: nn.Module, x: Tensor, batch: int = 256) -> Any:
    """Outputs on many inputs, as a numpy array."""
    training = module.training
    module.eval()
    with torch.no_grad():
        parts = [module(x[i : i + batch].to(_device(module))) for i in range(0, len(x), batch)]
    module.train(training)
    return torch.cat(parts).cpu().numpy()


def accuracy(plan: Plan, logits: Any, y: Any) -> float | None:
    """Share of correct labels; None for regression."""
    if plan.loss == "mse":
        return None
    return float((np.asarray(logits).argmax(1) == np.asarray(y)).mean())


def _tensors(plan: Plan, data: Data) -> tuple[Tensor, Tensor]:
    x, y = check_data(plan, data)
    return torch.from_numpy(x), torch.from_numpy(y)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def progress_bar(show: bool, total: int, what: str = "adapt") -> Iterator[Callable[[], None]]:
    """A progress bar on stderr where that is a terminal, or nothing."""
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
