"""A client on an emulated board, over its UART."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from federated.link_boards import LOCAL, Boards, agree, sines

from modicum.federated.board import BoardLearner
from modicum.federated.link import BoardSilent

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Boards:
    return Boards(tmp_path_factory)


@pytest.mark.parametrize(
    "on",
    [
        "m4f",
        pytest.param("m7", marks=pytest.mark.slow),
        pytest.param("m55", marks=pytest.mark.slow),
    ],
)
def test_an_emulated_board_learns_the_same_bits_as_the_library_within_its_ram(boards, on, capsys):
    folder = boards.sine()
    native = boards.native(folder)
    start = native.shared()
    with boards.board(folder, on) as board:
        learner = BoardLearner(board.link, folder, LOCAL)
        agree(native, learner, start, list(sines(32)))
        figures, pid = learner.figures(), board.line.pid
        assert figures.arena_high_water <= learner.plan.cost.arena
        assert 0 < figures.stack_high_water < figures.stack
        assert figures.ram < 64 * 1024 < learner.plan.board.ram == 256 * 1024
        with capsys.disabled():
            print(f"\n{on}: RAM {figures.ram} bytes; {figures}")

        os.kill(pid, signal.SIGKILL)
        with pytest.raises(BoardSilent, match="not open"):
            learner.predict(np.ones(1, np.float32))
        agree(native, learner, start, list(sines(32)))
        again, pid = learner.figures(), board.line.pid
        # the counter's ticks are not whole instructions
        assert abs(again.learn - figures.learn) <= 1
        assert abs(again.predict - figures.predict) <= 1
        assert 1_000 < again.predict < again.learn < 1_000_000  # executed instructions
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
