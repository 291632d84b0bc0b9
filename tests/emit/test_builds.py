"""The emitted folder builds without a warning, checks itself and runs clean under sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cases import CASES, build
from emit.folders import Workshop

import modicum as mo
from modicum import toolchain

CHECKED = [
    c
    for c in CASES
    if c.id in (
        "mobile-slices-Momentum", "groups-slices-Adam-x3", "norms-slices-Momentum-x2",
        "residuals-Full-SGD", "regression-Full-Adam-x2", "max_pools-Full-SGD",
        "average_pools-Full-SGD", "concats-Full-SGD-x3", "few_shot-slices-Adam-x3",
    )
]  # fmt: skip
rows = pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.id)
one = next(c for c in CHECKED if c.id == "groups-slices-Adam-x3")


@rows
def test_make_check_finds_no_difference_and_no_warning(workshop: Workshop, case):
    folder = workshop.emit(build(case))
    done = workshop.make(folder, "host-fast", "check")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.startswith("ok: ")


@rows
def test_training_is_clean_under_address_and_undefined_behaviour_sanitizers(
    workshop: Workshop, case
):
    folder = workshop.emit(build(case))
    done = workshop.make(folder, "sanitize-fast", "sanitize")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("parity", ["0", "1"])
def test_clang_compiles_without_a_warning_and_agrees(workshop: Workshop, parity):
    if shutil.which("clang") is None:
        pytest.skip("clang is not installed")
    folder = workshop.emit(build(one))
    command = ["make", "-s", "CC=clang", "OPT=-O1", f"PARITY={parity}", "host", "check"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_gcc_compiles_everything_without_a_warning_with_stricter_flags_too(workshop: Workshop):
    folder = workshop.emit(build(one))
    strict = "CFLAGS=-Wvla -Wdouble-promotion -Wshadow -Wundef -Wcast-qual -Wstrict-prototypes"
    command = ["make", "-s", "OPT=-O1", strict, "host", "lib"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_net_needs_nothing_but_memory_functions_from_outside(workshop: Workshop):
    folder = workshop.emit(build(one))
    done = workshop.make(folder, "lib-parity", "lib", "PARITY=1", "OPT=-O0")
    assert done.returncode == 0, done.stderr
    library = folder / "build" / "host-parity" / "libmodel.so"
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[-1].split("@")[0] for line in text.splitlines() if " U " in line}
    assert needed <= {"memcpy", "memset", "memmove", "memcmp", "__stack_chk_fail"}
    text = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in text.splitlines()} == {
        f"model_{name}"
        for name in ("init", "input", "predict", "train", "export_state", "import_state", "trained",
                     "size", "error")
    }  # fmt: skip


def test_make_check_names_the_first_step_and_tensor_that_differ(workshop: Workshop):
    folder = workshop.emit(build(next(c for c in CHECKED if c.id == "residuals-Full-SGD")))
    source = folder / "model_weights.c"
    text = source.read_text()
    start = text.index("model_initial_d_weight")
    number = re.compile(r"-?\d\.\d+(e-?\d+)?f")
    found = number.search(text, start)
    source.write_text(text[: found.start()] + "9.5f" + text[found.end() :])
    done = workshop.make(folder, "host-fast", "check")
    assert done.returncode != 0
    assert re.search(r"check: step 0, (logits|loss)", done.stderr), done.stderr


def test_emitting_twice_gives_the_same_bytes(workshop: Workshop):
    a, b = (workshop.emit(build(one)) for _ in range(2))
    for path in sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file()):
        if path.suffix != ".npz":  # a zip file holds the time
            assert (a / path).read_bytes() == (b / path).read_bytes(), path
    assert {p.relative_to(a) for p in a.rglob("*")} == {p.relative_to(b) for p in b.rglob("*")}


def test_kernels_are_compiled_once_for_all_folders(workshop, tmp_path, monkeypatch):
    """The second folder links what the first compiled, under a key that its contents decide."""
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPT", "-O0")
    first, second, third = (workshop.emit(build(one)) for _ in range(3))
    toolchain.build(first, "lib", True)
    (kept,) = toolchain.kernel_cache().iterdir()
    lent = {}

    def lend(kept, objects):
        real(kept, objects)
        lent.update({p: p.stat().st_mtime_ns for p in objects.rglob("*.o")})

    real = toolchain._lend
    monkeypatch.setattr(toolchain, "_lend", lend)
    toolchain.build(second, "lib", True)
    assert lent and all(p.stat().st_mtime_ns == at for p, at in lent.items())
    assert list(toolchain.kernel_cache().iterdir()) == [kept]
    changed = third / "kernels" / "loss.c"
    changed.write_text(changed.read_text() + "\n/* another kernel */\n")
    lent.clear()
    toolchain.build(third, "lib", True)
    assert not lent and len(list(toolchain.kernel_cache().iterdir())) == 2
    for folder in (first, second, third):
        assert mo.Native(folder, parity=True).outputs > 0
