"""The gateway's end of the link to a board: frames, and requests that are carried out once.

The protocol is in `emit/link/link.h`, and in docs/board-link.md.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import subprocess
import tempfile
import termios
import time
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modicum.errors import InvalidInput, ModicumError, UsageError

VERSION = 1
WORDS = 64  # of 32 bits, in the longest payload

HELLO, SLICE, BEGIN, WRITE, COMMIT, SAMPLE = 1, 2, 3, 4, 5, 6
LEARN, PREDICT, OUTPUT, READ, STATS, LEARN_OWN = 7, 8, 9, 10, 11, 12

ANSWER = 128  # added to the kind of a request
E_SESSION = 64
OF_VALUES = (2, 3, 4, 68, 69, 70, 72, 73)  # statuses that what was sent has brought about

HEAD = struct.Struct("<IHBB")  # session, sequence, kind, status
LONGEST = HEAD.size + 4 * WORDS + 4


class BoardSilent(ModicumError):
    """No answer: the time is up, or the line is closed.  Whether the request was carried out is
    not known, so the task is lost."""


class BoardRestarted(ModicumError):
    """The board has started anew, or another gateway has taken it; the task is lost."""


class Line(Protocol):
    """What bytes travel over.  At its end or on a failure it raises OSError, and the next write
    tries to open it again."""

    def read(self, timeout: float) -> bytes:
        """What has come, at least a byte; nothing if nothing does within `timeout` seconds."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


@dataclass
class Traffic:
    """Bytes on the wire, with framing; requests, how often one was sent again, and frames from
    the board that were damaged."""

    sent: int = 0
    received: int = 0
    requests: int = 0
    repeats: int = 0
    damaged: int = 0


class Link:
    """Requests to a board over a line, each carried out once whatever the line loses.

    A request that is not answered within `timeout` seconds is sent again, up to `retries` times:
    with a board that computes for longer, together they have to last.

    >>> link = Link(Serial("/dev/ttyACM0"))     # doctest: +SKIP
    """

    def __init__(self, line: Line, timeout: float = 1.0, retries: int = 8) -> None:
        self.line, self.timeout, self.retries = line, timeout, retries
        self.traffic = Traffic()
        self._session = self._sequence = 0
        self._frames = Frames()

    def open(self) -> bytes:
        """A new session; the answer to HELLO.  The board forgets its task."""
        self._session = secrets.randbelow(2**32 - 1) + 1
        try:
            return self._ask(HELLO, b"")
        except OSError:  # it was closed while no one looked
            return self.request(HELLO)

    def request(self, kind: int, payload: bytes = b"") -> bytes:
        """The payload of the answer.

        Raises BoardSilent or BoardRestarted, and then the session has ended; InvalidInput for
        values that the board refuses, ModicumError where it refuses the request.
        """
        if not self._session:
            raise UsageError(
                "there is no session with the board", hint="begin a task: begin(shared)"
            )
        try:
            return self._ask(kind, payload)
        except OSError as error:
            self._session = 0
            raise BoardSilent("the line to the board is not open", why=str(error)) from None

    def close(self) -> None:
        self._session = 0
        self.line.close()

    def _ask(self, kind: int, payload: bytes) -> bytes:
        self._sequence = (self._sequence + 1) % 2**16
        frame = stuff(HEAD.pack(self._session, self._sequence, kind, 0) + payload)
        self.traffic.requests += 1
        for attempt in range(1 + self.retries):
            self.traffic.repeats += attempt > 0
            self.traffic.sent += len(frame)
            self.line.write(frame)
            answer = self._answer(kind)
            if answer is not None:
                return self._judge(*answer)
        self._session = 0
        raise BoardSilent(
            "the board does not answer",
            why=f"{1 + self.retries} times asked, {self.timeout:g} s each",
            hint="is it connected and flashed with the link firmware, at this speed?",
        )

    def _answer(self, kind: int) -> tuple[int, bytes] | None:
        """Status and payload, or None when the time is up.  Answers to earlier requests pass by."""
        mine = (self._session, self._sequence, kind + ANSWER)
        end = time.monotonic() + self.timeout
        while (left := end - time.monotonic()) > 0:
            data = self.line.read(left)
            frames = self._frames.feed(data)
            self.traffic.received += len(data)
            self.traffic.damaged = self._frames.damaged
            for frame in frames:
                *whose, status = HEAD.unpack_from(frame)
                if tuple(whose) == mine:
                    return status, frame[HEAD.size :]
        return None

    def _judge(self, status: int, payload: bytes) -> bytes:
        if status == 0:
            return payload
        if status == E_SESSION:
            self._session = 0
            raise BoardRestarted(
                "the board knows nothing of this task",
                why="it restarted, or another gateway has taken it",
                hint="begin the task again with new samples",
            )
        error = InvalidInput if status in OF_VALUES else ModicumError
        raise error("the board refused", why=payload.decode("ascii", "replace"))


# ---- frames ----


def stuff(frame: bytes) -> bytes:
    """A frame as it goes on the wire: with its CRC, byte-stuffed, between two zeros."""
    frame += struct.pack("<I", zlib.crc32(frame))
    out = bytearray(b"\0")
    for i, run in enumerate(runs := frame.split(b"\0")):
        while len(run) >= 254:  # 255: a full block, and no zero behind it
            out += b"\xff" + run[:254]
            run = run[254:]
            if not run and i == len(runs) - 1:
                break
        else:
            out += bytes([len(run) + 1]) + run
    return bytes(out + b"\0")


def unstuff(block: bytes) -> bytes | None:
    """The frame between two zeros, without its CRC; None for one that is damaged."""
    out, at = bytearray(), 0
    while at < len(block):
        code = block[at]
        run = block[at + 1 : at + code]
        if len(run) != code - 1:
            return None
        out += run
        at += code
        if code < 255 and at < len(block):
            out.append(0)
    if not HEAD.size + 4 <= len(out) <= LONGEST:
        return None
    frame, crc = bytes(out[:-4]), struct.unpack("<I", out[-4:])[0]
    return frame if zlib.crc32(frame) == crc else None


class Frames:
    """Finds the frames in what comes over a line, whatever stands between them."""

    def __init__(self) -> None:
        self.damaged = 0
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *blocks, self._rest = (self._rest + data).split(b"\0")
        self._rest = self._rest[: 2 * LONGEST]  # garbage without an end
        found = [unstuff(block) for block in blocks if block]
        self.damaged += found.count(None)
        return [frame for frame in found if frame is not None]


# ---- lines ----


class _Descriptors:
    """A line over file descriptors, opened when something is written."""

    _fds: tuple[int, int] | None = None  # to read from, to write to

    def read(self, timeout: float) -> bytes:
        if self._fds is None:
            raise ConnectionError("it is not open")
        try:
            if not _ready(self._fds[0], select.POLLIN, timeout):
                return b""
            data = os.read(self._fds[0], 4096)
            if not data:
                raise ConnectionError("the other side has ended")
        except OSError as error:
            self.close()
            raise self._explained(error) from None
        return data

    def write(self, data: bytes) -> None:
        if self._fds is None:
            self._fds = self._open()
        try:
            while data:
                if not _ready(self._fds[1], select.POLLOUT, 10.0):
                    raise TimeoutError("nothing can be written")
                data = data[os.write(self._fds[1], data) :]
        except OSError as error:
            self.close()
            raise self._explained(error) from None

    def close(self) -> None:
        for fd in set(self._fds or ()):
            os.close(fd)
        self._fds = None

    def _open(self) -> tuple[int, int]:
        raise NotImplementedError

    def _explained(self, error: OSError) -> OSError:
        return error


class Serial(_Descriptors):
    """A serial device: 8 bits, no parity, no flow control.

    Raises UsageError for a speed that the system does not have.
    """

    def __init__(self, path: str | Path, baud: int = 115200) -> None:
        if not hasattr(termios, f"B{baud}"):
            raise UsageError(f"{baud} is no speed of a serial line", hint="115200, 921600")
        self.path, self.baud = path, baud

    def _open(self) -> tuple[int, int]:
        fd = os.open(self.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        speed = getattr(termios, f"B{self.baud}")
        flags = termios.CS8 | termios.CREAD | termios.CLOCAL
        try:
            characters = termios.tcgetattr(fd)[6]
            termios.tcsetattr(fd, termios.TCSANOW, [0, 0, flags, 0, speed, speed, characters])
            termios.tcflush(fd, termios.TCIOFLUSH)
        except termios.error as error:
            os.close(fd)
            raise OSError(f"{self.path} is no serial line: {error.args[-1]}") from None
        return fd, fd


class Socket(_Descriptors):
    """A unix socket by its path, or host:port."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _open(self) -> tuple[int, int]:
        host, _, port = self.address.rpartition(":")
        if host and port.isdigit():
            end = socket.create_connection((host, int(port)), timeout=10)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            end = socket.socket(socket.AF_UNIX)
            end.connect(self.address)
        fd = end.detach()
        return fd, fd


class Program(_Descriptors):
    """A program's standard input and output.  It is started when the line opens, and killed by its
    process id when the line closes, or this process ends."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.pid: int | None = None

    def _open(self) -> tuple[int, int]:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self._stderr, bufsize=0
            )
        except OSError:
            self._stderr.close()
            raise
        assert process.stdin is not None and process.stdout is not None
        self.pid = process.pid
        self._end = weakref.finalize(self, _end, process)
        return os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())

    def close(self) -> None:
        super().close()
        if self.pid is not None:
            self._end()
            self.pid = None
            with self._stderr as file:
                file.seek(0)
                self._last_words = file.read().decode(errors="replace").splitlines()[-8:]

    def _explained(self, error: OSError) -> OSError:
        return ConnectionError("\n".join([str(error), *self._last_words]))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _ready(fd: int, event: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(timeout * 1000))
