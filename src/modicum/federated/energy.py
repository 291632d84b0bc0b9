"""What a round costs a client in energy: a model of its board, never a measurement.

    E = P_active * instructions / (clock * ipc) + bytes * J_per_byte

The power, the clock and the radio's energy are the board's (`boards.toml`, with sources), executed
instructions come from an emulated core, and `ipc` instructions a cycle are an assumption: QEMU
knows no time.
"""

from __future__ import annotations

from dataclasses import dataclass

from modicum.board import Board
from modicum.errors import UsageError

IPC = 1.0
"""Instructions a cycle, assumed.  A Cortex-M4 issues at most one; loads and stalls take more."""


@dataclass(frozen=True)
class Energy:
    """A board's energy by the model above.

    >>> from modicum.board import get
    >>> model = Energy.of(get("nano33ble"))
    >>> f"{model.joules(instructions=64e6, bytes=10_000):.4f} J"
    '0.0111 J'
    """

    power_w: float
    clock_hz: float
    joules_per_byte: float
    ipc: float = IPC

    @staticmethod
    def of(board: Board, ipc: float = IPC) -> Energy:
        """Raises UsageError for a board whose power or radio no document states."""
        if board.active_power_w is None or board.radio_j_per_byte is None:
            raise UsageError(
                f"board {board.name} has no active power or no radio energy in the catalogue",
                hint="nano33ble, or a board file of your own with both and their sources",
            )
        return Energy(board.active_power_w, board.clock_hz, board.radio_j_per_byte, ipc)

    def joules(self, instructions: float, bytes: float) -> float:
        """Of computing and sending or receiving."""
        return self.compute(instructions) + self.radio(bytes)

    def compute(self, instructions: float) -> float:
        return self.power_w * instructions / (self.clock_hz * self.ipc)

    def radio(self, bytes: float) -> float:
        """Receiving a byte is taken to cost what sending one does."""
        return bytes * self.joules_per_byte
