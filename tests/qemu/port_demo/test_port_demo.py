"""The hand-written port (job runner, check, start-up, linker script) on a net made by hand.

A folder is put together as `emit` does it, with the demo net in place of a generated one, and built
for the host and for the three emulated boards.
"""

from __future__ import annotations

import math
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PORT = HERE.parents[2] / "src" / "modicum" / "emit" / "port"
BOARDS = ("m4f", "m7", "m55")
N_IN, N_OUT, N_TRAINED, ARENA = 4, 3, 15, 28
PREDICT, TRAIN, EXPORT, IMPORT = range(4)
PARAMETERS, PAINT, MICROSECONDS, PARITY = 1, 2, 256, 512

pytestmark = pytest.mark.qemu


# ---- the folder ----


def folder(path: Path) -> Path:
    for name in ("port", "kernels"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for file in PORT.iterdir():
        at_root = file.name in ("Makefile", "CMakeLists.txt")
        shutil.copy(file, path if at_root else path / "port")
    for file in HERE.iterdir():
        if file.suffix in (".c", ".h", ".mk"):
            shutil.copy(file, path)
    (path / "vectors.h").write_text(vectors())
    return path


def make(path: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        ["make", "-s", *arguments], cwd=path, capture_output=True, text=True, check=False
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = folder(tmp_path_factory.mktemp("demo"))
    make(path, "PARITY=1", "host", "sanitize", *BOARDS)
    return path


# ---- jobs and traces ----


def sample(kind: int, label: int, x: list[float], target: list[float] | None = None) -> bytes:
    return struct.pack(f"<Ii{len(target or ())}f{N_IN}f", kind, label, *(target or ()), *x)


def job(records: list[bytes], flags: int = PARAMETERS | PAINT, n_targets: int = 0) -> bytes:
    header = struct.pack("<4s5I", b"MOJB", 1, N_IN, n_targets, flags, len(records))
    return header + b"".join(records)


def digits(n: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [
        sample(
            PREDICT if i % 3 == 2 else TRAIN,
            rng.randrange(N_OUT),
            [rng.gauss(0, 1) for _ in range(N_IN)],
        )
        for i in range(n)
    ]


@dataclass
class Record:
    kind: int
    status: int
    loss: bytes
    elapsed: int
    payload: bytes


@dataclass
class Trace:
    flags: int
    records: list[Record]
    arena: int
    stack: int
    stack_size: int
    data: int
    bss: int
    net: int
    count: int
    status: int
    peak_rss: int

    def numbers(self) -> list[tuple[int, int, bytes, bytes]]:
        return [(r.kind, r.status, r.loss, r.payload) for r in self.records]


def parse(raw: bytes) -> Trace:
    magic, version, n_out, n_trained, arena, flags = struct.unpack_from("<4s5I", raw)
    assert (magic, version, n_out, n_trained, arena) == (b"MOTR", 1, N_OUT, N_TRAINED, ARENA)
    at, records = 24, []
    while raw[at : at + 4] != b"MOND":
        kind, status, loss, elapsed = struct.unpack_from("<Ii4sI", raw, at)
        at += 16
        size = 0
        if kind == PREDICT and status == 0:
            size = 4 * n_out
        elif kind == TRAIN and flags & PARAMETERS:
            size = 4 * n_trained
        elif kind == EXPORT and status == 0:
            (length,) = struct.unpack_from("<I", raw, at)
            size = 4 + (length + 3) // 4 * 4
        records.append(Record(kind, status, loss, elapsed, raw[at : at + size]))
        at += size
    trailer = struct.unpack_from("<4s7IiI", raw, at)
    assert at + 40 == len(raw)
    return Trace(flags, records, *trailer[1:])


@dataclass
class Run:
    code: int
    text: str
    trace: bytes | None


def run(path: Path, target: str, what: bytes, cwd: Path, variant: str = "parity") -> Run:
    (cwd / "trace.bin").unlink(missing_ok=True)
    (cwd / "job.bin").write_bytes(what)
    if target in BOARDS:
        image = path / "build" / f"{target}-{variant}" / "main.elf"
        command = [str(path / "port" / "qemu.sh"), target, str(image), str(cwd)]
    else:
        command = [str(path / "build" / f"{target}-{variant}" / "main")]
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    trace = cwd / "trace.bin"
    text = result.stdout + result.stderr
    return Run(result.returncode, text, trace.read_bytes() if trace.exists() else None)


def trace_of(path: Path, target: str, what: bytes, cwd: Path, variant: str = "parity") -> Trace:
    result = run(path, target, what, cwd, variant)
    assert result.code == 0, result.text
    assert result.trace is not None
    return parse(result.trace)


# ---- vectors.h, from the same net in double precision ----


def vectors(steps: int = 3, spoil: tuple[int, str] | None = None) -> str:
    weight = [[0.25 * (o - i) for i in range(N_IN)] for o in range(N_OUT)]
    bias = [0.0] * N_OUT
    rng = random.Random(3)

    def logits(x: list[float]) -> list[float]:
        return [
            bias[o] + sum(w * v for w, v in zip(weight[o], x, strict=True)) for o in range(N_OUT)
        ]

    text = ['#include "check.h"', "#define MO_CHECK_MEMBERS 1"]
    text.append("#define MO_CHECK_TOLERANCE 1e-4f")
    rows = []
    for step in range(steps):

        def array(name: str, values: list[float], step: int = step) -> str:
            if spoil == (step, name):
                values = [*values[:-1], values[-1] + 0.01]
            label = f"{name.replace('.', '_')}_{step}"
            body = ", ".join(float(v).hex() + "f" for v in values)
            text.append(f"static const float {label}[] = {{{body}}};")
            return label

        x = [struct.unpack("f", struct.pack("f", rng.gauss(0, 1)))[0] for _ in range(N_IN)]
        label = rng.randrange(N_OUT)
        before = logits(x)
        total = sum(math.exp(z) for z in before)
        loss = math.log(total) - before[label]
        for o in range(N_OUT):
            gradient = math.exp(before[o]) / total - (o == label)
            weight[o] = [w - 0.5 * gradient * v for w, v in zip(weight[o], x, strict=True)]
            bias[o] -= 0.5 * gradient
        flat = [w for row in weight for w in row]
        # the weights are compared at every other element, to try the stride
        tensors = [("fc.weight", 0, 1, 2, flat[1::2], flat), ("fc.bias", 1, 0, 1, bias, bias)]
        names = []
        for name, index, first, stride, values, whole in tensors:
            expected = array(name, values)
            scale = float(max(map(abs, whole))).hex()
            names.append(
                f'{{"{name}", {index}, {first}, {stride}, {len(values)}, {scale}f, {expected}}}'
            )
        text.append(
            f"static const mo_check_tensor_t tensors_{step}[] = {{\n  " + ",\n  ".join(names) + "};"
        )
        rows.append(
            f"{{{array('input', x)}, {label}, NULL, {array('before', before)}, "
            f"{loss.hex()}f, {array('after', logits(x))}, 2, tensors_{step}}}"
        )
    text.append("static const mo_check_step_t steps[] = {")
    text.append("  " + ",\n  ".join(rows) + "};")
    members = f"{{{{{steps}, steps}}}}"
    text.append(f"static const mo_check_member_t mo_check_members[MO_CHECK_MEMBERS] = {members};")
    return "\n".join(text) + "\n"


# ---- tests ----


def test_host_and_boards_give_the_same_bits(parity: Path, tmp_path: Path) -> None:
    work = job(digits(30))
    host = trace_of(parity, "host", work, tmp_path)
    assert host.flags == PARAMETERS | PAINT | MICROSECONDS | PARITY
    assert struct.unpack("<f", host.records[0].loss)[0] > 0
    assert trace_of(parity, "sanitize", work, tmp_path).numbers() == host.numbers()
    for board in BOARDS:
        trace = trace_of(parity, board, work, tmp_path)
        assert trace.flags == PARAMETERS | PAINT | PARITY
        assert trace.numbers() == host.numbers(), board


def test_an_emulated_run_is_the_same_every_time(parity: Path, tmp_path: Path) -> None:
    work = job(digits(9))
    for board in BOARDS:
        assert run(parity, board, work, tmp_path).trace == run(parity, board, work, tmp_path).trace


def test_instructions_of_equal_steps_are_equal(parity: Path, tmp_path: Path) -> None:
    x = [1.0, -1.0, 0.5, 0.0]
    for board in BOARDS:
        trace = trace_of(parity, board, job([sample(PREDICT, 0, x)] * 20), tmp_path)
        elapsed = [r.elapsed for r in trace.records]
        assert max(elapsed) - min(elapsed) <= 2
        assert 100 < elapsed[0] < 300


def test_memory_figures_are_those_that_port_h_promises(parity: Path, tmp_path: Path) -> None:
    for board in BOARDS:
        trace = trace_of(parity, board, job(digits(6)), tmp_path)
        assert trace.arena == ARENA
        assert trace.data == 0
        assert trace.bss == (8 + 4 * N_OUT + 7) // 8 * 8
        assert trace.net == 4 * N_TRAINED + ARENA + 16
        assert trace.stack_size == 4096
        assert 152 < trace.stack <= 208
        frames = (parity / "build" / f"{board}-parity" / "port" / "main.su").read_text()
        assert "main\t152\tstatic" in frames


@pytest.mark.parametrize("target", ["host", *BOARDS])
def test_a_bad_sample_is_an_error_of_its_record_only(
    parity: Path, tmp_path: Path, target: str
) -> None:
    good = sample(PREDICT, 0, [1.0, 2.0, 3.0, 4.0])
    bad = [
        sample(TRAIN, N_OUT, [0.0] * N_IN),
        sample(TRAIN, -1, [0.0] * N_IN),
        sample(TRAIN, 0, [0.0, math.nan, 0.0, 0.0]),
        sample(PREDICT, 0, [math.inf, 0.0, 0.0, 0.0]),
    ]
    trace = trace_of(parity, target, job([good, *bad, good]), tmp_path)
    assert [r.status for r in trace.records] == [0, -1, -1, -2, -2, 0]
    assert trace.records[0].payload == trace.records[-1].payload


REFUSED = {
    "empty": (b"", "not a job file"),
    "other file": (b"PK\x03\x04" + bytes(100), "not a job file"),
    "short header": (job([])[:20], "not a job file"),
    "version": (struct.pack("<4s5I", b"MOJB", 2, N_IN, 0, 0, 0), "version is 2"),
    "inputs": (struct.pack("<4s5I", b"MOJB", 1, 5, 0, 0, 0), "n_inputs is 5, this net has 4"),
    "targets": (struct.pack("<4s5I", b"MOJB", 1, N_IN, 3, 0, 0), "n_targets is 3"),
    "flags": (struct.pack("<4s5I", b"MOJB", 1, N_IN, 0, 4, 0), "unknown flags"),
}


@pytest.mark.parametrize("target", ["sanitize", *BOARDS])
@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_does_not_fit_is_refused(
    parity: Path, tmp_path: Path, target: str, case: str
) -> None:
    what, message = REFUSED[case]
    result = run(parity, target, what, tmp_path)
    assert result.code == 2
    assert message in result.text
    assert result.trace is None


CUT = {
    "in a sample": (job(digits(3))[:-1], 1, "record 2 is cut short"),
    "before a sample": (job(digits(3))[:-24], 1, "record 2 is missing"),
    "unknown kind": (job([*digits(2), sample(9, 0, [0.0] * N_IN)]), 2, "record 2 is of a kind"),
    "too long": (job(digits(2)) + b"x", 2, "goes on after its last record"),
}


@pytest.mark.parametrize("target", ["sanitize", *BOARDS])
@pytest.mark.parametrize("case", CUT)
def test_a_broken_job_ends_with_its_code_in_the_trace(
    parity: Path, tmp_path: Path, target: str, case: str
) -> None:
    what, code, message = CUT[case]
    result = run(parity, target, what, tmp_path)
    assert result.code == code
    assert message in result.text
    assert result.trace is not None
    trace = parse(result.trace)
    assert (trace.count, trace.status) == (2, code)


def test_random_bytes_never_crash_the_runner(parity: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    whole = bytearray(job(digits(5)))
    for _ in range(40):
        broken = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        cut = rng.choice([len(broken), rng.randrange(len(broken))])
        result = run(parity, "sanitize", bytes(broken[:cut]), tmp_path)
        assert result.code in (0, 1, 2), result.text


def test_the_state_travels_through_a_job(parity: Path, tmp_path: Path) -> None:
    def blob(state: bytes) -> bytes:
        return struct.pack("<III", IMPORT, 0, len(state)) + state + bytes(-len(state) % 4)

    export = struct.pack("<II", EXPORT, 0)
    look = sample(PREDICT, 0, [1.0, 2.0, 3.0, 4.0])
    first = trace_of(parity, "sanitize", job([*digits(9), export, look]), tmp_path)
    state = first.records[9].payload[4:]
    assert len(state) == 4 * N_TRAINED
    second = trace_of(
        parity,
        "sanitize",
        job([blob(state[:-1]), blob(state), blob(state + b"abc"), look]),
        tmp_path,
    )
    assert [r.status for r in second.records] == [-3, 0, -3, 0]
    assert second.records[3].payload == first.records[10].payload
    too_long = run(parity, "sanitize", job([blob(bytes(1000))]), tmp_path)
    assert (too_long.code, "too long a state" in too_long.text) == (2, True)


@pytest.mark.parametrize("stack", ["64", "120", "184"])
def test_a_stack_that_overflows_is_a_fault(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, stack: str
) -> None:
    path = folder(tmp_path_factory.mktemp("stack"))
    make(path, "PARITY=1", f"STACK_LEN={stack}", *BOARDS)
    for board in BOARDS:
        result = run(path, board, job(digits(3)), tmp_path)
        assert result.code == 99
        assert "the stack overflowed" in result.text


def test_a_write_past_the_arena_shows(tmp_path: Path) -> None:
    path = folder(tmp_path / "demo")
    make(path, "PARITY=1", "CFLAGS=-DDEMO_OVERRUN=2", "host", "m4f")
    for target in ("host", "m4f"):
        assert trace_of(path, target, job(digits(3)), tmp_path).arena == ARENA + 8


@pytest.mark.parametrize("ram", [256, 320])
def test_a_write_past_the_ram_of_the_chip_is_a_fault(tmp_path: Path, ram: int) -> None:
    path = folder(tmp_path / "demo")
    length = ram * 1024
    make(path, "PARITY=1", f"RAM_LEN={length}", f"CFLAGS=-DDEMO_OVERRUN={length // 4}", *BOARDS)
    for board in BOARDS:
        result = run(path, board, job(digits(3)), tmp_path)
        assert result.code == 99
        assert "addr" in result.text


@pytest.mark.parametrize(("board", "floats"), [("m4f", 2**22), ("m7", 2**22), ("m55", 2**21)])
def test_weights_may_fill_the_memory_of_the_machine(
    parity: Path, tmp_path: Path, board: str, floats: int
) -> None:
    path = folder(tmp_path / "demo")
    limits = ("PARITY=1", "RAM_LEN=4M", "FLASH_LEN=32M")
    make(path, *limits, f"CFLAGS=-DDEMO_BALLAST={floats}", board)
    work = job(digits(6))
    expected = trace_of(parity, "host", work, tmp_path)
    assert trace_of(path, board, work, tmp_path).numbers() == expected.numbers()
    result = make(path, *limits, f"CFLAGS=-DDEMO_BALLAST={floats + 1}", board, check=False)
    assert "overflowed" in result.stderr


def test_the_linker_holds_the_program_to_the_chip(tmp_path: Path) -> None:
    path = folder(tmp_path)
    result = make(path, "FLASH_LEN=4K", "m4f", check=False)
    assert "does not fit the flash of the board" in result.stderr
    result = make(path, "RAM_LEN=4K", "m4f", check=False)
    assert "region `RAM' overflowed" in result.stderr
    result = make(path, "RAM_LEN=5M", "m55", check=False)
    assert "machine has less RAM" in result.stderr


def test_the_check_passes_everywhere(tmp_path: Path) -> None:
    path = folder(tmp_path)
    for variant in ("PARITY=1", "PARITY=0"):
        for target in ("check", "sanitize", *(f"check-{board}" for board in BOARDS)):
            result = make(path, variant, target)
            assert "ok: 3 steps, 15 tensors, largest difference " in result.stdout + result.stderr


@pytest.mark.parametrize("target", ["check", "check-m7"])
@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ((1, "before"), "check: step 1, logits before differs at element 2: "),
        ((1, "fc.weight"), "check: step 1, fc.weight differs at element 10: "),
        ((2, "fc.bias"), "check: step 2, fc.bias differs at element 2: "),
        ((2, "after"), "check: step 2, logits after differs at element 2: "),
    ],
)
def test_the_check_names_the_first_difference(
    tmp_path: Path, target: str, spoiled: tuple[int, str], message: str
) -> None:
    path = folder(tmp_path)
    (path / "vectors.h").write_text(vectors(spoil=spoiled))
    result = make(path, target, check=False)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    if target == "check":
        program = path / "build" / "host-fast" / "check"
        assert subprocess.run([program], capture_output=True, check=False).returncode == 5


def test_targets_are_read_before_the_inputs(tmp_path: Path) -> None:
    path = folder(tmp_path / "demo")
    make(path, "PARITY=1", "CFLAGS=-DDEMO_TARGETS=3", "host", "m4f", "m55")
    rng = random.Random(7)
    records = [
        sample(kind, 0, [rng.gauss(0, 1) for _ in range(4)], [rng.gauss(0, 1) for _ in range(3)])
        for kind in (TRAIN, PREDICT, TRAIN, TRAIN, PREDICT)
    ]
    work = job(records, n_targets=3)
    host = trace_of(path, "host", work, tmp_path)
    weight = [[0.25 * (o - i) for i in range(4)] for o in range(3)]
    target, x = (
        struct.unpack_from("<3f", records[0], 8),
        struct.unpack_from("<4f", records[0], 20),
    )
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]
    loss = sum((z - t) ** 2 for z, t in zip(logits, target, strict=True)) / 3
    assert struct.unpack("<f", host.records[0].loss)[0] == pytest.approx(loss, rel=1e-5)
    for board in ("m4f", "m55"):
        trace = trace_of(path, board, work, tmp_path)
        assert trace.numbers() == host.numbers()
        assert trace.bss == 8 + 4 * 6


def test_the_fast_build_agrees_to_rounding(parity: Path, tmp_path: Path) -> None:
    make(parity, "host", *BOARDS)
    work = job(digits(9))
    exact = trace_of(parity, "host", work, tmp_path)
    for target in ("host", *BOARDS):
        trace = trace_of(parity, target, work, tmp_path, "fast")
        assert not trace.flags & PARITY
        for found, expected in zip(trace.records, exact.records, strict=True):
            loss = struct.unpack("<f", expected.loss)[0]
            assert struct.unpack("<f", found.loss)[0] == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_flags_and_lengths_are_noticed_by_a_second_make(tmp_path: Path) -> None:
    path = folder(tmp_path / "demo")
    make(path, "PARITY=1", "m4f")
    make(path, "PARITY=1", "STACK_LEN=2048", "CFLAGS=-DDEMO_OVERRUN=1", "m4f")
    trace = trace_of(path, "m4f", job(digits(3)), tmp_path)
    assert (trace.stack_size, trace.arena) == (2048, ARENA + 4)


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert "no C compiler: nocc is" in make(path, "CC=nocc", "host", check=False).stderr
    result = make(path, "CROSS=nothing-", "m4f", check=False)
    assert "no cross compiler: nothing-gcc is" in result.stderr
    result = make(path, "QEMU=noqemu", "check-m4f", check=False)
    assert "no emulator: noqemu is" in result.stderr


def test_the_shared_library_exports_the_api_and_nothing_else(tmp_path: Path) -> None:
    path = folder(tmp_path)
    make(path, "lib")
    library = path / "build" / "host-fast" / "libdemo.so"
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    calls = "init input predict train export_state import_state trained error".split()
    assert names == {f"demo_{call}" for call in calls}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="not installed: cmake")
def test_cmake_builds_the_same_programs(tmp_path: Path) -> None:
    path, build = folder(tmp_path / "demo"), tmp_path / "cmake"
    for command in (
        ["cmake", "-S", path, "-B", build, "-DMODICUM_PARITY=ON"],
        ["cmake", "--build", build],
        [build / "check"],
    ):
        subprocess.run(command, check=True, capture_output=True)
