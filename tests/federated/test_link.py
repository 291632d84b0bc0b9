"""The link to a board: frames, requests carried out once, and what the board refuses.

The board is the firmware as a program of this machine; test_board_link.py has the emulated ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from federated.link_boards import LOCAL, Boards, Damaging, Deaf, Echoing, agree, sines
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.federated import link as wire
from modicum.federated.board import BoardLearner, Emulated, keep_private
from modicum.federated.learner import Learner, NativeLearner
from modicum.federated.link import (
    BoardRestarted,
    BoardSilent,
    Frames,
    Link,
    Program,
    Serial,
    Socket,
    stuff,
    unstuff,
)

NAN = struct.pack("<f", float("nan"))


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Boards:
    return Boards(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(boards: Boards) -> Path:
    return boards.sine()


@pytest.fixture(scope="module")
def native(boards: Boards, folder: Path) -> NativeLearner:
    return boards.native(folder)


@pytest.fixture
def board(boards: Boards, folder: Path):
    with boards.board(folder) as board:
        yield board


def learner(board: Emulated, folder: Path, line: wire.Line | None = None) -> BoardLearner:
    return BoardLearner(Link(line or board.line, timeout=0.1, retries=40), folder, LOCAL)


# ---- frames ----

payloads = st.binary(max_size=4 * wire.WORDS).map(lambda data: bytes(wire.HEAD.size) + data)
runs = st.integers(0, 260).map(lambda n: bytes(wire.HEAD.size) + b"\x07" * min(n, 256))


@given(st.lists(payloads | runs, min_size=1, max_size=4), st.lists(st.binary(max_size=40)))
def test_frames_come_out_as_they_went_in_whatever_stands_between_them(frames, garbage):
    between = (garbage + [b""] * len(frames))[: len(frames)]
    data = b"".join(g + stuff(frame) for g, frame in zip(between, frames, strict=True))
    assert Frames().feed(data) == frames
    one_by_one = Frames()
    assert [f for i in range(len(data)) for f in one_by_one.feed(data[i : i + 1])] == frames


@given(payloads | runs)
def test_a_stuffed_frame_has_no_zero_and_two_bytes_more_at_most(frame):
    stuffed = stuff(frame)
    assert stuffed[0] == stuffed[-1] == 0 and 0 not in stuffed[1:-1]
    assert len(stuffed) <= len(frame) + 4 + 2 + 2


@given(payloads, st.data())
def test_a_frame_that_is_damaged_or_cut_is_no_frame(frame, data):
    block = stuff(frame)[1:-1]
    at = data.draw(st.integers(0, len(block) - 1))
    byte = data.draw(st.integers(1, 255).filter(lambda b: b != block[at]))
    assert unstuff(block[:at] + bytes([byte]) + block[at + 1 :]) is None
    assert unstuff(block[:at]) is None


# ---- a board that learns ----


def test_a_board_learns_predicts_and_shares_the_same_bits_as_the_library(board, folder, native):
    other: Learner = learner(board, folder)
    start = native.shared()
    assert np.array_equal(other.shared(), start)
    for task in range(2):
        agree(native, other, start + np.float32(0.01 * task), list(sines(24, task)))


def test_samples_and_outputs_longer_than_a_frame_go_in_pieces(boards):
    folder = boards.images()
    native = boards.native(folder, ())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 2, 8, 8)).astype(np.float32)
    with boards.board(folder, local=()) as board:
        other = BoardLearner(board.link, folder)
        agree(native, other, native.shared(), [(image, 10 * i) for i, image in enumerate(x)])
        with pytest.raises(InvalidInput, match="label"):
            other.learn(x[0], 70)
        with pytest.raises(InvalidInput, match="127 values, the net takes 128"):
            other.learn(np.zeros(127, np.float32), 0)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_lost_and_doubled_frames_change_nothing_that_is_learned(
    board, folder, native, seed
):
    other = learner(board, folder, Damaging(board.line, seed, rate=0.2))
    other.link.timeout = 0.02
    agree(native, other, native.shared(), list(sines(32, seed)))
    assert other.link.traffic.repeats > 10


def test_a_sample_whose_answer_was_lost_is_not_learned_twice(board, folder, native):
    other = learner(board, folder, Deaf(board.line))
    other.link.timeout = 0.01
    agree(native, other, native.shared(), list(sines(20)))
    traffic = other.link.traffic
    assert traffic.repeats >= traffic.requests
    assert other.figures().repeated > traffic.requests - 20


def test_an_echo_is_neither_an_answer_nor_a_request(board, folder, native):
    other = learner(board, folder, Echoing(board.line))
    agree(native, other, native.shared(), list(sines(20)))
    assert other.link.traffic.repeats == other.figures().damaged == 0


def test_a_sample_of_a_small_net_is_one_short_frame(board, folder):
    board = learner(board, folder)
    board.begin(board.shared())
    before = board.link.traffic.sent, board.link.traffic.received
    board.learn(np.ones(1, np.float32), np.ones(1, np.float32))
    traffic = board.link.traffic
    assert (traffic.sent - before[0], traffic.received - before[1]) == (23, 19)


# ---- what goes wrong ----


def test_a_silent_board_is_an_error_after_the_last_retry(board, folder):
    class Silent(Deaf):
        def read(self, timeout):
            time.sleep(timeout)
            return b""

    began = time.monotonic()
    with pytest.raises(BoardSilent, match="does not answer") as error:
        BoardLearner(Link(Silent(board.line), timeout=0.05, retries=3), folder, LOCAL)
    assert 0.2 <= time.monotonic() - began < 2
    assert "4 times asked, 0.05 s each" in str(error.value)


def test_a_board_that_restarts_in_a_task_is_an_error_and_the_next_task_begins(
    board, folder, native
):
    other = learner(board, folder)
    samples = list(sines(20))
    start = native.shared()
    other.begin(start)
    other.learn(*samples[0])
    board.power_off()
    with pytest.raises(BoardRestarted, match="begin the task again"):
        other.learn(*samples[1])
    with pytest.raises(UsageError, match="no session"):
        other.learn(*samples[1])
    agree(native, other, start, samples)


def test_a_board_that_dies_in_a_task_is_an_error_and_the_next_task_begins(board, folder, native):
    other = learner(board, folder)
    start = native.shared()
    other.begin(start)
    os.kill(board.line.pid, signal.SIGKILL)
    x = np.ones(1, np.float32)
    with pytest.raises(BoardSilent, match="not open"):
        other.learn(x, x)
    agree(native, other, start, list(sines(20)))
    os.kill(board.line.pid, signal.SIGKILL)  # between tasks no one notices
    agree(native, other, start, list(sines(20)))


def test_the_program_of_a_board_ends_with_its_line(boards, folder):
    with boards.board(folder) as board:
        learner(board, folder)
        pid = board.line.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_second_gateway_takes_the_board_and_the_first_is_told(board, folder):
    first, second = learner(board, folder), learner(board, folder)
    second.begin(second.shared())
    with pytest.raises(BoardRestarted, match="another gateway has taken it"):
        first.predict(np.ones(1, np.float32))


def test_what_a_program_said_before_it_ended_is_in_the_error(folder):
    line = Program(["sh", "-c", "echo the stack overflowed >&2"])
    with pytest.raises(BoardSilent, match="the stack overflowed"):
        BoardLearner(Link(line), folder, LOCAL)


def test_a_line_that_cannot_be_opened_says_why(folder, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for line in (Serial(nowhere), Socket(nowhere), Program([nowhere])):
        with pytest.raises(BoardSilent, match="No such file"):
            BoardLearner(Link(line), folder, LOCAL)
    (tmp_path / "file").touch()
    with pytest.raises(BoardSilent, match="no serial line"):
        Link(Serial(tmp_path / "file")).open()
    with pytest.raises(UsageError, match="no speed"):
        Serial("/dev/ttyS0", baud=12345)


# ---- what the board refuses ----


def test_a_board_with_another_plan_is_refused(boards, board):
    with pytest.raises(InvalidInput, match="another plan"):
        BoardLearner(board.link, boards.sine(rate=0.03), LOCAL)


def test_a_learner_with_other_local_parameters_than_the_firmware_is_refused(board, folder):
    with pytest.raises(InvalidInput, match=r"firmware: layers\.4\.weight, layers\.4\.bias"):
        BoardLearner(board.link, folder, ("layers.0.*",))


def test_a_private_slice_is_neither_read_nor_written(board, folder):
    other = learner(board, folder)
    assert [part.name for part in other.layout.local] == ["layers.4.weight", "layers.4.bias"]
    for part in other.layout.local:
        link = other.link
        with pytest.raises(InvalidInput, match="does not leave the board"):
            link.request(wire.READ, struct.pack("<III", part.index, 0, 1))
        with pytest.raises(InvalidInput, match="does not leave the board"):
            link.request(wire.WRITE, struct.pack("<IIf", part.index, 0, 1.0))


def test_training_does_not_start_from_half_written_weights(board, folder, native):
    other = learner(board, folder)
    link, x = other.link, np.ones(1, np.float32)
    start = other.shared()
    link.request(wire.WRITE, struct.pack("<IIf", 0, 3, 0.5))
    for attempt in (lambda: other.learn(x, x), lambda: other.predict(x), other.shared):
        with pytest.raises(ModicumError, match="state of the task"):
            attempt()
    with pytest.raises(ModicumError, match="not those that were sent"):
        link.request(wire.COMMIT, struct.pack("<I", 0))
    with pytest.raises(ModicumError, match="state of the task"):
        other.learn(x, x)
    agree(native, other, start, list(sines(20)))
    with pytest.raises(ModicumError, match="state of the task"):  # the task is under way
        link.request(wire.WRITE, struct.pack("<IIf", 0, 3, 0.5))


def test_weights_and_samples_that_are_not_finite_are_refused_and_change_nothing(board, folder):
    other = learner(board, folder)
    start = other.shared()
    with pytest.raises(InvalidInput, match="nothing was written"):
        other.link.request(wire.WRITE, struct.pack("<II", 0, 0) + NAN)
    assert np.array_equal(other.shared(), start)
    with pytest.raises(InvalidInput, match="not finite"):
        other.learn(np.full(1, np.nan, np.float32), np.ones(1, np.float32))
    with pytest.raises(InvalidInput, match="not finite"):
        other.begin(np.full_like(start, np.inf))
    assert np.array_equal(other.shared(), start)


@pytest.mark.parametrize(
    ("kind", "words", "why"),
    [
        (wire.WRITE, (99, 0, 0), "no such slice"),
        (wire.WRITE, (0, 40, 0), "not so many values"),
        (wire.WRITE, (0, 2**32 - 1, 0), "not so many values"),
        (wire.READ, (0, 0, 41), "not so many values"),
        (wire.READ, (0, 0, 65), "wrong length"),
        (wire.SLICE, (6,), "no such slice"),
        (wire.OUTPUT, (1,), "wrong length"),
        (wire.BEGIN, (1,), "wrong length"),
        (wire.LEARN, (0,), "not whole"),
        (wire.LEARN, (0, 0, 0), "not whole"),
        (wire.PREDICT, (), "not whole"),
        (wire.SAMPLE, (1, 0), "not whole"),
        (wire.LEARN_OWN, (1,), "no sensor"),
        (77, (), "no such request"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_the_reason(board, folder, kind, words, why):
    other = learner(board, folder)
    with pytest.raises(ModicumError, match=why):
        other.link.request(kind, struct.pack(f"<{len(words)}I", *words))
    with pytest.raises(ModicumError, match="wrong length"):
        other.link.request(kind if kind < 77 else wire.STATS, b"abc")


# ---- the board's own samples ----


def test_a_firmware_with_a_sensor_learns_samples_that_never_leave_it(boards, monkeypatch):
    folder = boards.sine(rate=0.01)
    (folder / "mine.c").write_text(
        "#include <stdint.h>\n"
        "int mo_link_sample(float *x, float *target, int32_t *label);\n"
        "int mo_link_sample(float *x, float *target, int32_t *label)\n"
        "{\n"
        "  static int32_t n;\n"
        "  (void)label;\n"
        "  x[0] = (float)n * 0.25f;\n"
        "  target[0] = x[0] * x[0];\n"
        "  return n++ < 20 ? 0 : -1;\n"
        "}\n"
    )
    monkeypatch.setenv("SENSOR", "mine.c")
    native = boards.native(folder)
    x = np.arange(20, dtype=np.float32)[:, None] * np.float32(0.25)
    with boards.board(folder) as board:
        other = BoardLearner(board.link, folder, LOCAL)
        start = other.shared()
        native.begin(start)
        losses = [native.learn(v, v * v) for v in x]
        other.begin(start)
        assert other.learn_own(4) == (4, pytest.approx(np.mean(losses[:4])))
        assert other.learn_own(99) == (16, pytest.approx(np.mean(losses[4:])))
        assert np.array_equal(native.shared(), other.shared())
        with pytest.raises(InvalidInput, match="no sensor, or it gives no sample"):
            other.learn_own(1)


# ---- lines ----


def test_a_serial_device_and_a_socket_carry_the_link_too(board, folder, native, tmp_path):
    ours, theirs = os.openpty()
    with running(board.line.command, ours):
        link = Link(Serial(os.ttyname(theirs)))
        agree(native, BoardLearner(link, folder, LOCAL), native.shared(), list(sines(20)))
        link.close()
    os.close(ours)
    os.close(theirs)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        link = Link(Socket(str(tmp_path / "socket")))
        link.line.write(b"\0")  # connects
        end, _ = listener.accept()
    with end, running(board.line.command, end.fileno()):
        agree(native, BoardLearner(link, folder, LOCAL), native.shared(), list(sines(20)))
        link.close()


@contextmanager
def running(command: list[str], end: int) -> Iterator[None]:
    with subprocess.Popen(command, stdin=end, stdout=end) as process:
        try:
            yield
        finally:
            process.kill()


# ---- the firmware's C ----


def test_the_firmware_takes_any_bytes_under_the_sanitizers(boards, folder, tmp_path):
    """Random bytes, and random requests in whole frames; the kernels are checked elsewhere."""
    boards.board(folder)  # compiles the kernels
    keep_private(folder, LOCAL)
    program = tmp_path / "linked"
    sources = [*folder.glob("model*.c"), *folder.glob("link/link*.c")]
    sources += [folder / "link" / "uart_host.c", *folder.glob("port/port_[ht]*.c")]
    kernels = folder.glob("build/host-parity/kernels/*.o")
    flags = "-std=c99 -O0 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wundef -Wcast-qual -Wvla"
    sanitize = "-Wdouble-promotion -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    include = [f"-I{folder / place}" for place in (".", "kernels", "port")]
    done = subprocess.run(
        [shutil.which("gcc") or "cc", *flags.split(), *sanitize.split(), *include]
        + [str(path) for path in (*sources, *kernels)]
        + ["-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for seed in range(4):
        rng = Random(seed)
        data = b"".join(_anything(rng, sequence) for sequence in range(4000))
        done = subprocess.run([str(program)], input=data, capture_output=True, check=False)
        assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
        kinds = {frame[6] - wire.ANSWER for frame in Frames().feed(done.stdout) if frame[7] == 0}
        assert kinds >= set(range(wire.HELLO, wire.STATS + 1)) - {wire.COMMIT}


def _anything(rng: Random, sequence: int) -> bytes:
    """A request that may be right, or not, or noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(600))
    kind = rng.choice([wire.BEGIN, *range(14)])
    words = [rng.choice([0, 1, 5, 40, rng.getrandbits(32)]) for _ in range(rng.randrange(5))]
    payload = struct.pack(f"<{len(words)}I", *words) + bytes(rng.choice([0, 0, 0, 3, 4, 200]))
    session = 7 if rng.random() < 0.95 else rng.getrandbits(32)
    return stuff(wire.HEAD.pack(session, sequence, kind, 0) + payload[: 4 * wire.WORDS])


@pytest.mark.parametrize("answer", [b"", b"abc", bytes(12)])
def test_an_answer_of_another_length_is_an_error_that_says_so(board, folder, monkeypatch, answer):
    """A peer may be anything: neither a crash nor a wait without end."""
    client = BoardLearner(board.link, folder, LOCAL)
    client.begin(client.layout.check(np.zeros(client.layout.size, np.float32)))
    monkeypatch.setattr(board.link, "request", lambda *args: answer)
    x = np.zeros(1, np.float32)
    for ask in (
        lambda: client.learn(x, x),
        lambda: client.predict(x),
        client.shared,
        client.figures,
        lambda: client.learn_own(1),
    ):
        with pytest.raises(InvalidInput, match="does not fit its question"):
            ask()
