"""The small training loop on top of `apply`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.apply import Tuned, apply
from modicum.data import Data, check_data
from modicum.errors import InvalidInput, UsageError
from modicum.optim import SGD, Adam
from modicum.plan import Plan
from modicum.trace import Trace


def adapt(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    epochs: int = 10,
    test: Data | None = None,
    seed: int = 0,
    micro_batch: int = 1,
    record: bool = False,
    progress: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Trace:
    """Train under a plan and return the Trace; `model` is left alone.

    `data` and `test` are (inputs (n, ...), labels (n,)), or targets (n, outputs) for mse.  Each
    epoch visits all samples in a new order drawn from `seed`; an update follows every
    ``plan.accumulate`` samples.  One sample at a time passes through the network, as on a board,
    so that memory is what the plan says; `micro_batch` > 1 trades memory for speed.  With
    `record` the trace holds every trained slice after every step.  ``trace.state`` holds what
    was learned.  Raises InvalidInput for data that does not fit the plan or is not finite.
    """
    if epochs < 0 or micro_batch < 1:
        raise UsageError(
            f"cannot train for {epochs} epochs in micro-batches of {micro_batch}",
            hint="epochs from 0 and micro_batch from 1 on",
        )
    x, y = _tensors(plan, data)
    checked = None if test is None else _tensors(plan, test)
    tuned = apply(model, plan)
    x, y = x.to(_device(tuned)), y.to(_device(tuned))
    trace = Trace(where="torch", plan_hash=plan.hash, seed=seed)
    if checked is not None:
        trace.logits_before = predict(tuned, checked[0])
        trace.accuracy_before = accuracy(plan, trace.logits_before, checked[1])
    rng = np.random.default_rng(seed)
    trace.order = [int(i) for _ in range(epochs) for i in rng.permutation(len(x))]
    recorded: dict[str, list[Any]] = {name: [] for name in tuned.moving}
    start = time.perf_counter()
    with _bar(progress, len(trace.order)) as advance:
        for i, loss in _train(tuned, plan, x, y, trace.order, micro_batch):
            trace.losses.append(loss)
            if record:
                for name, p in tuned.moving.items():
                    recorded[name].append(p.detach().cpu().numpy().copy())
            if on_step is not None:
                on_step(i, loss)
            advance()
    trace.figures["seconds"] = time.perf_counter() - start
    if record:
        trace.tensors = {name: np.stack(values) for name, values in recorded.items() if values}
    if checked is not None:
        trace.logits_after = predict(tuned, checked[0])
        trace.accuracy_after = accuracy(plan, trace.logits_after, checked[1])
    trace.state = {name: t.cpu().numpy() for name, t in tuned.learned().items()}
    return trace


def _train(
    tuned: Tuned, plan: Plan, x: Tensor, y: Tensor, order: list[int], micro_batch: int
) -> Any:
    """Yield (step, loss) per sample; the update of a sample has happened when it is yielded."""
    optimizer = torch_optimizer(plan.optimizer, tuned, plan)
    optimizer.zero_grad(set_to_none=True)
    done = 0
    while done < len(order):
        room = plan.accumulate - done % plan.accumulate
        rows = order[done : done + min(room, micro_batch)]
        losses = sample_losses(plan, tuned(x[rows]), y[rows])
        if not bool(torch.isfinite(losses).all()):
            raise InvalidInput(
                f"the loss is not finite at step {done}", hint="a smaller learning rate"
            )
        (losses.sum() / plan.accumulate).backward()
        if (done + len(rows)) % plan.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for i, loss in enumerate(losses.tolist()):
            yield done + i, loss
        done += len(rows)


def sample_losses(plan: Plan, logits: Tensor, y: Tensor) -> Tensor:
    """One loss per sample."""
    if plan.loss == "mse":
        return ((logits - y.reshape(logits.shape)) ** 2).flatten(1).mean(1)
    return nn.functional.cross_entropy(logits, y, reduction="none")


def torch_optimizer(config: SGD | Adam, tuned: Tuned, plan: Plan) -> torch.optim.Optimizer:
    """The optimiser of a plan over the trained slices, with each slice's own step size."""
    rates = {u.param: u.rates[0] for u in plan.selection.updates}
    groups = [{"params": [p], "lr": config.lr * rates[n]} for n, p in tuned.trained.items()]
    if isinstance(config, Adam):
        return torch.optim.Adam(
            groups, config.lr, config.betas, config.eps, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


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
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, or nothing."""
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("adapt", total=total)
        yield lambda: bar.advance(task)
