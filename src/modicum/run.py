"""Build an emitted folder and run it on this host or on an emulated board -> Trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from modicum.data import Data, check_data, check_samples
from modicum.errors import InvalidInput, ModicumError, ToolMissing, UsageError
from modicum.job import ADD, ATTEND, PAINT, PARAMETERS, PREDICT, TRAIN, Job, Result, decode
from modicum.plan import Plan
from modicum.state import from_c, image_to_c
from modicum.toolchain import build
from modicum.trace import Trace


@dataclass(frozen=True)
class Machine:
    """An emulated board: make target and QEMU machine."""

    target: str
    qemu: str
    core: str


MACHINES = {
    "m4f": Machine("m4f", "mps2-an386", "Cortex-M4F"),
    "m7": Machine("m7", "mps2-an500", "Cortex-M7"),
    "m55": Machine("m55", "mps3-an547", "Cortex-M55"),
}
ON = ("host", *MACHINES)


def run(
    folder: str | Path,
    on: str = "host",
    *,
    train: Data | None = None,
    order: list[int] | None = None,
    test: Data | None = None,
    support: Data | None = None,
    refresh: int | None = None,
    select: int | None = None,
    parity: bool = True,
    record: bool = False,
    timeout: float = 600.0,
) -> Trace:
    """Build the folder, run a training job on it, and return the Trace.

    `on` is host, m4f, m7, m55, or qemu (the machine with the core of the plan's board).  The job
    predicts `test`, trains on ``train`` in the given order (all samples once by default), and
    predicts `test` again; without `train` it replays the folder's check samples.  A parity build
    gives the same bits everywhere; otherwise it is built for speed.  `record` keeps every trained
    slice after every step.  The figures are measured, see Trace; on an emulated board
    instructions are executed instructions, not time.

    Of a net with a cosine head, `support` gives the prototypes: at first, before every `refresh`
    training samples (by default before every update; 0: no more), and before the last
    predictions.  Of a candidate set, `select` is the index of the plan that is run, 0 by default.

    Raises ToolMissing without compiler or QEMU, ModicumError when the build or the run fails.
    """
    folder = Path(folder)
    plan = Plan.load(plan_file(folder, select))
    machine = find_machine(on, plan)
    if train is None:
        train = _check_samples(folder / "vectors.npz")
    train = check_data(plan, train)
    test = None if test is None else check_data(plan, test)
    order = list(range(len(train[0]))) if order is None else order
    if any(not 0 <= i < len(train[0]) for i in order):
        raise InvalidInput(f"the order names samples beyond the {len(train[0])} that there are")
    support = _check_support(plan, support, refresh)
    job = _empty_job(plan, record)
    if is_set(folder):
        job.select(select or 0)
    _fill(job, plan, train, order, test, support, refresh)
    program = build(folder, machine.target if machine else "host", parity)
    result = _execute(program, machine, job, timeout)
    trace = Trace(where=on if machine is None else machine.target, plan_hash=plan.hash)
    trace.order = order
    _read(plan, result, trace, None if test is None else len(test[0]), test)
    if record:
        _split(plan, result, trace)
    trace.figures = {**_figures(plan, result, machine), **_sections(program, machine)}
    return trace


def is_set(folder: Path) -> bool:
    """Whether an emitted folder holds a candidate set."""
    return (folder / "plan-0.json").is_file()


def plan_file(folder: Path, select: int | None = None) -> Path:
    """The plan of an emitted folder, or the one of a candidate set that is to be run.

    Raises InvalidInput for another folder, and UsageError for a plan that it does not hold.
    """
    if not is_set(folder):
        if not (folder / "plan.json").is_file():
            raise InvalidInput(f"{folder} is not an emitted folder", why="it has no plan.json")
        if select is not None:
            raise UsageError(f"{folder} holds one plan", why="there is nothing to select")
        return folder / "plan.json"
    path = folder / f"plan-{select or 0}.json"
    if (select or 0) < 0 or not path.is_file():
        last = len(list(folder.glob("plan-*.json"))) - 1
        raise UsageError(f"{folder} holds no plan {select}", hint=f"--select 0 to {last}")
    return path


def _check_support(plan: Plan, support: Data | None, refresh: int | None) -> Data | None:
    """Inputs, and labels whatever the loss."""
    if support is None:
        if refresh is not None:
            raise UsageError("prototypes are refreshed from what?", hint="run(..., support=(x, y))")
        return None
    if plan.program.refresh is None:
        raise UsageError(
            "the net has no prototypes to refresh", hint="few_shot(model, ways) before the plan"
        )
    if refresh is not None and refresh < 0:
        raise UsageError(f"prototypes cannot be refreshed every {refresh} samples")
    return check_samples(plan.graph, support)


def _check_samples(path: Path) -> Data:
    try:
        with np.load(path, allow_pickle=False) as vectors:
            return vectors["x"], vectors["y"]
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise InvalidInput(f"{path} has no check samples", why=str(error)) from None


def find_machine(on: str, plan: Plan) -> Machine | None:
    """The emulated board of a name; None is the host."""
    if on == "qemu":
        wanted = plan.board.qemu if plan.board else None
        found = next((m for m in MACHINES.values() if m.qemu == wanted), None)
        if found is None:
            board = plan.board.name if plan.board else "a plan without a board"
            raise UsageError(
                f"no emulated machine has the core of {board}",
                hint="--on " + ", ".join(ON),
            )
        return found
    if on not in ON:
        raise UsageError(f"cannot run on {on!r}", hint="--on " + ", ".join((*ON, "qemu")))
    return MACHINES.get(on)


def _empty_job(plan: Plan, record: bool) -> Job:
    graph = plan.graph
    outputs = graph.values[graph.output].size
    targets = outputs if plan.loss == "mse" else 0
    flags = PAINT | (PARAMETERS if record else 0)
    return Job(graph.values[graph.input].size, targets, flags)


def _fill(
    job: Job,
    plan: Plan,
    train: Data,
    order: list[int],
    test: Data | None,
    support: Data | None,
    refresh: int | None,
) -> None:
    plan.check_updates(len(order))
    images, labels = image_to_c(train[0]), np.asarray(train[1])
    tests: Any = image_to_c(test[0]) if test is not None else []
    known = [] if support is None else list(zip(image_to_c(support[0]), support[1], strict=True))

    def prototypes() -> None:
        if known:
            job.clear_prototypes()
        for x, label in known:
            job.add_prototype(x, int(label))

    def sample(do: Callable[..., None], i: int) -> None:
        if plan.loss == "mse":
            do(images[i], target=np.asarray(labels[i], np.float32).ravel())
        else:
            do(images[i], int(labels[i]))

    every = plan.accumulate if refresh is None else refresh
    prototypes()
    for x in tests:
        job.predict(x)
    for step, i in enumerate(order):
        if step and every and step % every == 0:
            prototypes()
        chooses = plan.looks[plan.pattern_of(step // plan.accumulate)] is not None
        if chooses and step % plan.accumulate == 0:
            for k in order[step : step + plan.accumulate]:
                sample(job.attend, k)
        sample(job.train, i)
    if every and len(tests):
        prototypes()
    for x in tests:
        job.predict(x)


def _execute(program: Path, machine: Machine | None, job: Job, timeout: float) -> Result:
    with tempfile.TemporaryDirectory(prefix="modicum-run-") as scratch:
        place = Path(scratch)
        (place / "job.bin").write_bytes(job.encode())
        command = [str(program.resolve())] if machine is None else qemu_command(machine, program)
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise ModicumError(
                f"the run did not end within {timeout:.0f} s", where=" ".join(command)
            ) from None
        output = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode != 0 or not (place / "trace.bin").is_file():
            raise ModicumError(
                f"the run failed with exit status {done.returncode}",
                where=str(program),
                why=output[-8:] or ["it printed nothing"],
            )
        return decode((place / "trace.bin").read_bytes())


def qemu_command(machine: Machine, program: Path) -> list[str]:
    """Deterministic emulation: virtual time advances 64 ns per instruction."""
    qemu = shutil.which(os.environ.get("QEMU", "qemu-system-arm"))
    if qemu is None:
        raise ToolMissing("QEMU is not installed", hint="apt install qemu-system-arm")
    return [
        *(qemu, "-M", machine.qemu, "-display", "none", "-monitor", "none", "-serial", "none"),
        *("-icount", "shift=6,sleep=off", "-semihosting-config", "enable=on,target=native"),
        *("-kernel", str(program.resolve())),
    ]


def _read(plan: Plan, result: Result, trace: Trace, tests: int | None, test: Data | None) -> None:
    failed = next((i for i, r in enumerate(result.records) if r.status != 0), None)
    if failed is not None:
        kind, status = result.records[failed].kind, result.records[failed].status
        step = sum(r.kind == kind for r in result.records[:failed])
        what = {PREDICT: "test sample", ADD: "support sample"}.get(kind, "sample")
        raise InvalidInput(
            f"the net refused {what} {step}",
            why=f"status {status}",
            hint="labels in range, inputs finite, a smaller learning rate",
        )
    trace.losses = [r.loss for r in result.records if r.kind == TRAIN]
    predictions = [r.values for r in result.records if r.kind == PREDICT]
    if tests and test is not None:
        trace.logits_before = np.stack(predictions[:tests])
        trace.logits_after = np.stack(predictions[tests:])
        if plan.loss == "cross_entropy":
            labels = np.asarray(test[1])
            trace.accuracy_before = float((trace.logits_before.argmax(1) == labels).mean())
            trace.accuracy_after = float((trace.logits_after.argmax(1) == labels).mean())


def _split(plan: Plan, result: Result, trace: Trace) -> None:
    """The trained slices after every step, in PyTorch's layout."""
    steps = [r.values for r in result.records if r.kind == TRAIN]
    at = 0
    for t in plan.program.learned:
        parts = [from_c(v[at : at + t.size], t.shape, t.layout) for v in steps]
        trace.tensors[t.param] = np.stack(parts)
        at += t.size


def _figures(plan: Plan, result: Result, machine: Machine | None) -> dict[str, float]:
    figures: dict[str, float] = {
        "arena_planned": plan.cost.arena,
        "arena_high_water": result.arena_high_water,
    }
    unit = "microseconds" if result.microseconds else "instructions"
    timed = {TRAIN: "train", ATTEND: "attend", PREDICT: "predict", ADD: "prototype"}
    for kind, name in timed.items():
        elapsed = [r.elapsed for r in result.records if r.kind == kind]
        if elapsed:
            figures[f"{unit}_{name}"] = float(np.median(elapsed))
            if kind == TRAIN:
                figures[f"{unit}_train_all"] = float(np.sum(elapsed, dtype=np.float64))
    if machine is None:
        figures["peak_rss"] = result.peak_rss
    else:
        figures["stack_high_water"] = result.stack_high_water
        static = result.data + result.bss + result.net - result.arena
        figures["static"] = static
        figures["ram"] = result.arena_high_water + static + result.stack_high_water
        figures["ram_planned"] = plan.cost.ram
    return figures


def _sections(program: Path, machine: Machine | None) -> dict[str, float]:
    """Section sizes in bytes, from the toolchain's size."""
    tool = shutil.which("arm-none-eabi-size" if machine else "size")
    if tool is None:
        return {}
    done = subprocess.run([tool, "-A", str(program)], capture_output=True, text=True, check=False)
    sizes: dict[str, int] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == 3 and words[0].startswith(".") and words[1].isdigit():
            sizes[words[0]] = int(words[1])
    keep = {"text": (".text", ".rodata"), "data": (".data",), "bss": (".bss",)}
    keep = {**keep, "weights": (".weights",)} if machine else keep
    return {k: float(sum(sizes.get(s, 0) for s in names)) for k, names in keep.items()}
