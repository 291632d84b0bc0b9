"""Plan + weights -> a folder of self-contained C99 that predicts and trains on a board."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.data import check_data
from modicum.emit.schedule import Source, render
from modicum.errors import InvalidInput, UsageError
from modicum.plan import Plan
from modicum.state import materialise
from modicum.units import kib

if TYPE_CHECKING:
    from torch import nn

VECTORS = 3  # training samples that `make check` replays
RAM_GRAIN = 1024
RESERVED = ("net", "main", "port", "check", "semihost", "startup", "vectors")


def emit(
    model: nn.Module,
    plan: Plan,
    out: str | Path,
    *,
    name: str = "model",
    data: tuple[Any, Any] | None = None,
) -> Path:
    """Write the C folder of a plan and return its path.

    `name` prefixes every symbol, so that one firmware can hold several nets.  `data` (inputs,
    labels) gives the samples of the check vectors; without it they are random.  The folder is
    written whole or not at all.  Raises UsageError when `out` exists and is not empty, and
    InvalidInput when the plan is not for `model`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in RESERVED:
        raise UsageError(
            f"{name!r} cannot prefix C symbols", hint="lower-case letters, digits and _"
        )
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(
            f"{target} exists and is not an empty folder", hint="another --out, or empty it first"
        )
    files = _sources(model, plan, name, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".emit-") as scratch:
        made = Path(scratch) / "net"
        _copy_package(made)
        for path, text in files.items():
            (made / path).write_text(text)
        x, y = _check_samples(plan, data)
        np.savez(made / "vectors.npz", x=x, y=y)
        plan.save(made / "plan.json")
        if target.exists():
            target.rmdir()
        shutil.move(str(made), target)
    return target


def _sources(
    model: nn.Module, plan: Plan, name: str, data: tuple[Any, Any] | None
) -> dict[str, str]:
    from modicum.capture import check_model, state_of

    check_model(plan.graph, model)
    source = Source(plan, name, materialise(plan.program.graph, state_of(model)))
    source.schedule()  # collects the constants and tables that the text below declares
    schedule = source.schedule()
    declarations, definitions = source.weights()
    return {
        f"{name}.h": source.header(),
        f"{name}.c": schedule,
        f"{name}_weights.h": declarations,
        f"{name}_weights.c": definitions,
        "net.h": source.shim(),
        "net.mk": _settings(plan, name),
        "vectors.h": _vectors(model, plan, data),
        "README.md": _readme(plan, name),
    }


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


def _settings(plan: Plan, name: str) -> str:
    """net.mk: the RAM of the real chip, as far as the emulated machines have it (4 MB)."""
    ram = plan.board.ram if plan.board else 4 << 20
    flash = plan.board.flash if plan.board else 64 << 20
    mcu = plan.board is not None and plan.board.kind == "mcu"
    if not mcu:
        ram, flash = 4 << 20, 64 << 20
    ram = min(ram, 4 << 20) // RAM_GRAIN * RAM_GRAIN
    stack = max(4096, plan.cost.stack) if mcu else 8192
    return (
        f"# of the board that the plan is for\nNET = {name}\n"
        f"RAM_LEN = {ram}\nFLASH_LEN = {flash}\nSTACK_LEN = {stack}\n"
    )


def _check_samples(plan: Plan, data: tuple[Any, Any] | None) -> tuple[Any, Any]:
    graph = plan.graph
    n = max(VECTORS, plan.accumulate)
    if data is not None:
        return check_data(plan, (data[0][:n], data[1][:n]))
    rng = np.random.default_rng(0)
    shape = graph.shape(graph.input)[1:]
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    outputs = graph.values[graph.output].size
    if plan.loss == "mse":
        return x, rng.standard_normal((n, outputs)).astype(np.float32)
    return x, np.arange(n) % outputs


def _vectors(model: nn.Module, plan: Plan, data: tuple[Any, Any] | None) -> str:
    """Train in PyTorch on the check samples and write down what it saw."""
    from modicum.emit import reference
    from modicum.emit.vectors import vectors_header

    x, y = _check_samples(plan, data)
    trace, logits = reference.trace(model, plan, x, y)
    if not np.isfinite(trace.losses).all():
        raise InvalidInput("training on the check samples diverges", hint="a smaller learning rate")
    return vectors_header(plan, x, y, trace, logits)


def _readme(plan: Plan, name: str) -> str:
    return render(
        "readme.md.j2",
        net=name,
        NET=name.upper(),
        plan=plan,
        target="target" if plan.loss == "mse" else "label",
        arena=kib(plan.cost.arena),
        stack=kib(plan.cost.stack),
        weights=kib(plan.cost.flash_weights),
    )
