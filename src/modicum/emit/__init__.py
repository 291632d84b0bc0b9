"""Plan or plans + weights -> a folder of self-contained C99 that predicts and trains on a board."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modicum.data import check_data
from modicum.emit.candidates import Candidates
from modicum.emit.sources import candidate_set, one_plan
from modicum.errors import InvalidInput, UsageError
from modicum.plan import Plan
from modicum.state import materialise

if TYPE_CHECKING:
    from torch import nn

VECTORS = 3  # training samples that `make check` replays
RAM_GRAIN = 1024
RESERVED = ("net", "main", "port", "check", "semihost", "startup", "vectors")


def emit(
    model: nn.Module,
    plan: Plan | None = None,
    out: str | Path | None = None,
    *,
    plans: Sequence[Plan] | None = None,
    name: str = "model",
    data: tuple[Any, Any] | None = None,
) -> Path:
    """Write the C folder of a plan and return its path.

    `plans` in the place of `plan` makes a candidate set: one net that holds all of them, with one
    arena and each frozen weight once, and that the board switches between (see `Candidates`).
    `name` prefixes every symbol, so that one firmware can hold several nets.  `data` (inputs,
    labels) gives the samples of the check vectors; without it they are random.  The folder is
    written whole or not at all.  Raises UsageError when `out` exists and is not empty, or the
    plans do not belong together, DoesNotFit when their flash does not suffice, and InvalidInput
    when a plan is not for `model`.
    """
    if (plan is None) == (plans is None) or out is None:
        raise UsageError("emit takes a plan or plans, and a folder", hint="emit(model, plan, out)")
    candidates = Candidates(tuple(plans)) if plans is not None else None
    every = candidates.plans if candidates else (cast(Plan, plan),)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in RESERVED:
        raise UsageError(
            f"{name!r} cannot prefix C symbols", hint="lower-case letters, digits and _"
        )
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target} exists and is not an empty folder", hint="another --out, or empty it first"
        )
    files = _sources(model, every, candidates, name, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".emit-") as scratch:
        made = Path(scratch) / "net"
        _copy_package(made)
        for path, text in files.items():
            (made / path).write_text(text)
        x, y = max((_check_samples(p, data) for p in every), key=lambda samples: len(samples[0]))
        np.savez(made / "vectors.npz", x=x, y=y)
        for i, p in enumerate(every):
            p.save(made / (f"plan-{i}.json" if candidates else "plan.json"))
        if target.exists():
            target.rmdir()
        shutil.move(str(made), target)
    return target


def _sources(
    model: nn.Module,
    plans: Sequence[Plan],
    candidates: Candidates | None,
    name: str,
    data: tuple[Any, Any] | None,
) -> dict[str, str]:
    from modicum.capture import check_model, state_of

    check_model(plans[0].graph, model)
    state = state_of(model)
    values = {k: v for p in plans for k, v in materialise(p.program.graph, state).items()}
    if candidates is None:
        files = one_plan(plans[0], name, values)
    else:
        files = candidate_set(candidates, name, values)
    return {**files, "net.mk": _settings(plans, name), "vectors.h": _vectors(model, plans, data)}


def _copy_package(target: Path) -> None:
    package = resources.files("modicum.emit")
    (target / "kernels").mkdir(parents=True)
    (target / "port").mkdir()
    for folder, into in (("c", "kernels"), ("port", "port")):
        for item in package.joinpath(folder).iterdir():
            if item.name.endswith((".c", ".h", ".in", ".sh")):
                (target / into / item.name).write_bytes(item.read_bytes())
    for item_name in ("Makefile", "CMakeLists.txt"):
        text = package.joinpath("port", item_name).read_text()
        (target / item_name).write_text(text)


def _settings(plans: Sequence[Plan], name: str) -> str:
    """net.mk: the RAM of the real chip, as far as the emulated machines have it (4 MB)."""
    board = plans[0].board
    ram, flash = 4 << 20, 64 << 20
    mcu = board is not None and board.kind == "mcu"
    if board is not None and mcu:
        ram, flash = board.ram, board.flash
    ram = min(ram, 4 << 20) // RAM_GRAIN * RAM_GRAIN
    stack = max(4096, *(p.cost.stack for p in plans)) if mcu else 8192
    return (
        f"# of the board that the plan is for\nNET = {name}\n"
        f"RAM_LEN = {ram}\nFLASH_LEN = {flash}\nSTACK_LEN = {stack}\n"
    )


def _check_samples(plan: Plan, data: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """VECTORS different samples, again and again until every pattern has had an update."""
    graph = plan.graph
    if data is not None:
        x, y = check_data(plan, (data[0][:VECTORS], data[1][:VECTORS]))
    else:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((VECTORS, *graph.shape(graph.input)[1:])).astype(np.float32)
        outputs = graph.values[graph.output].size
        mse = plan.loss == "mse"
        labels = np.arange(VECTORS) % outputs
        y = rng.standard_normal((VECTORS, outputs)).astype(np.float32) if mse else labels
    updates = 1 + max(pattern.steps[0] for pattern in plan.patterns)
    n = max(len(x), updates * plan.accumulate)
    if plan.attends:  # by all samples of an update
        n = -(-n // plan.accumulate) * plan.accumulate
    again = np.arange(n) % len(x)
    return x[again], y[again]


def _vectors(model: nn.Module, plans: Sequence[Plan], data: tuple[Any, Any] | None) -> str:
    """Train in PyTorch on the check samples and write down what it saw."""
    from modicum.emit import reference
    from modicum.emit.vectors import Seen, vectors_header

    seen = []
    for plan in plans:
        x, y = _check_samples(plan, data)
        trace, logits = reference.trace(model, plan, x, y)
        if not np.isfinite(trace.losses).all():
            raise InvalidInput(
                "training on the check samples diverges", hint="a smaller learning rate"
            )
        seen.append(Seen(plan, x, y, trace, logits))
    return vectors_header(seen)


__all__ = ["Candidates", "emit"]
