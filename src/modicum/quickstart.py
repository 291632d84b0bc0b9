"""The main job on real digits: train, plan for a board, adapt to new classes, emit C, compare.

A small CNN learns the digits 0-5 of scikit-learn's bundled set; then it is adapted to 6-9 from
five samples of each, within a board's RAM, in PyTorch and as C on the host and on three emulated
Cortex-M boards.  All other samples of 6-9 are the test set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.adapt import adapt
from modicum.capture import capture
from modicum.emit import emit
from modicum.errors import ParityError, ToolMissing, UsageError
from modicum.methods import Full, Method
from modicum.models.small import DigitsNet
from modicum.optim import SGD
from modicum.plan import Plan, plan
from modicum.report import report
from modicum.run import MACHINES, run
from modicum.trace import Comparison, Trace, compare

OLD, NEW = range(6), range(6, 10)
SHOTS = 5
EPOCHS = 15
SEEDS = 5
LR = 0.01

Data = tuple[Any, Any]


@dataclass
class Quickstart:
    """What the quick start found: one plan, five seeds in PyTorch, one of them also in C."""

    plan: Plan
    pretrained: float
    traces: list[Trace]
    runs: list[Trace]
    comparisons: list[Comparison]
    skipped: list[str]

    def as_dict(self) -> dict[str, Any]:
        before = [t.accuracy_before or 0.0 for t in self.traces]
        after = [t.accuracy_after or 0.0 for t in self.traces]
        return {
            "board": self.plan.board.name if self.plan.board else None,
            "cost": self.plan.cost.model_dump(),
            "accuracy_old_classes": self.pretrained,
            "accuracy_before": float(np.mean(before)),
            "accuracy_after": float(np.mean(after)),
            "accuracy_after_by_seed": after,
            "steps": len(self.traces[0].losses),
            "runs": [{"where": t.where, **t.figures} for t in self.runs],
            "comparisons": [c.as_dict() for c in self.comparisons],
            "skipped": self.skipped,
        }


def quickstart(
    out: str | Path,
    board: str = "nano33ble",
    method: Method | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Quickstart:
    """Run the main job; writes the C folder, plan, traces and report below `out`.

    Boards that cannot be emulated here are skipped and named.  Raises UsageError when `out` is not
    empty, ParityError when two traces part.
    """
    # tiny tensors: threads cost more than they bring, and much more on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _quickstart(Path(out), board, method, say, progress)
    finally:
        torch.set_num_threads(threads)


def _quickstart(
    out: Path, board: str, method: Method | None, say: Callable[[str], None], progress: bool
) -> Quickstart:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", hint="another --out")
    images, labels = digits()
    say("training a small CNN on the digits 0-5")
    base, pretrained = pretrain(images, labels, seed=0)
    say(f"  {pretrained:.1%} right on held-out samples of 0-5")
    out.mkdir(parents=True, exist_ok=True)
    traces, first = [], None
    for seed in range(SEEDS):
        model = with_new_head(base, len(NEW), seed)
        support, test = split(images, labels, seed)
        made = plan(capture(model, support[0]), board, method or Full(), SGD(lr=LR))
        if first is None:
            first = (model, made, support, test)
            say(f"\n{made}\n\nadapting to the digits 6-9, {SHOTS} samples each, {SEEDS} seeds")
        trace = adapt(
            model, made, support, epochs=EPOCHS, test=test, seed=seed, progress=progress,
            record=seed == 0,
        )  # fmt: skip
        say(f"  seed {seed}: {trace.accuracy_before:.1%} -> {trace.accuracy_after:.1%}")
        traces.append(trace)
    assert first is not None
    model, made, support, test = first
    folder = emit(model, made, out / "c", name="digits", data=support)
    say(f"\nthe same training in C: {folder}")
    runs, comparisons, skipped = _run_all(folder, traces[0], support, test, say)
    result = Quickstart(made, pretrained, traces, runs, comparisons, skipped)
    made.save(out / "plan.json")
    for trace in [traces[0], *runs]:
        trace.save(out / f"trace-{trace.where}.json")
    torch.save({k: v for k, v in model.state_dict().items()}, out / "model.pt")
    page = report(made, traces[0], *runs, out=out / "report.html")
    (out / "report.txt").write_text(page.text() + "\n")
    say(f"\nreport: {out / 'report.html'}")
    parted = next((c for c in comparisons if not c.same), None)
    if parted is not None:
        raise ParityError(str(parted))
    return result


def _run_all(
    folder: Path, trace: Trace, support: Data, test: Data, say: Callable[[str], None]
) -> tuple[list[Trace], list[Comparison], list[str]]:
    runs: list[Trace] = []
    comparisons: list[Comparison] = []
    skipped: list[str] = []
    for on in ("host", *MACHINES):
        try:
            ran = run(folder, on, train=support, order=trace.order, test=test, record=True)
        except ToolMissing as missing:
            if on == "host":
                raise
            skipped.append(on)
            say(f"  {on}: skipped, {missing.what}")
            continue
        reference = runs[0] if runs else trace
        comparisons.append(compare(reference, ran))
        runs.append(ran)
        memory = ""
        if "ram" in ran.figures:
            memory = (
                f"; RAM {ran.figures['ram']:,.0f} of {ran.figures['ram_planned']:,.0f} planned"
                f"; {ran.figures['instructions_train'] / 1e6:.2f} M instructions a step"
            )
        say(f"  {comparisons[-1]}{memory}")
    return runs, comparisons, skipped


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's bundled digits: images (1797, 1, 8, 8) in 0..1, labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ToolMissing(
            "the digits come with scikit-learn, which is not installed",
            hint='pip install "modicum[digits]"',
        ) from None
    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target)


def split(images: Tensor, labels: Tensor, seed: int) -> tuple[Data, Data]:
    """Support (SHOTS samples of each new class) and test set (all others), labels from 0."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    rest: list[int] = []
    for label in NEW:
        found = rng.permutation(np.flatnonzero(labels.numpy() == label))
        chosen += found[:SHOTS].tolist()
        rest += found[SHOTS:].tolist()
    first = min(NEW)
    return (images[chosen], labels[chosen] - first), (images[rest], labels[rest] - first)


def with_new_head(base: nn.Module, classes: int, seed: int) -> nn.Module:
    """A copy of the network with an untrained classifier."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.head = nn.Linear(model.head.in_features, classes)
    return model.eval()


def pretrain(images: Tensor, labels: Tensor, seed: int) -> tuple[nn.Module, float]:
    """DigitsNet on the old classes, shifted by up to a pixel; every fifth sample is held out."""
    torch.manual_seed(seed)
    old = torch.isin(labels, torch.tensor(list(OLD)))
    x, y = images[old], labels[old]
    held = torch.arange(len(x)) % 5 == 0
    net = DigitsNet(len(OLD)).train()
    steps, batch = 600, 64
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    fit_x, fit_y = x[~held], y[~held]
    for _ in range(steps):
        pick = torch.randint(len(fit_x), (batch,))
        loss = nn.functional.cross_entropy(net(_shifted(fit_x[pick])), fit_y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        right = (net(x[held]).argmax(1) == y[held]).float().mean()
    return net, float(right)


def _shifted(x: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    corners = torch.randint(0, 3, (len(x), 2)).tolist()
    return torch.stack([p[:, r : r + 8, c : c + 8] for p, (r, c) in zip(padded, corners)])  # noqa: B905


__all__ = ["Quickstart", "quickstart"]
