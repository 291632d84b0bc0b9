"""Bytes that really pass: a relay in front of the server's port that counts them."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Meter:
    """Relays connections on the loopback interface to a port there, TLS and all, and counts.

    `up` are bytes from nodes to the server, `down` from it to them: all that TCP carries, with
    TLS, HTTP and Flower's own messages; the headers of TCP and IP are not in it.

    >>> with Meter(8000) as meter:          # doctest: +SKIP
    ...     print(meter.port)               # where the nodes are told that the server is
    """

    def __init__(self, server: int) -> None:
        self.server = server
        self.up = self.down = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]

    def __enter__(self) -> Meter:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the one that accepts
        self._door.close()
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _close(end)
        self._accepting.join(timeout=5)

    @property
    def bytes(self) -> tuple[int, int]:
        """(up, down) so far."""
        with self._lock:
            return self.up, self.down

    def _accept(self) -> None:
        while True:
            try:
                node, _ = self._door.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.server), timeout=10)
            except OSError:  # no server: the node is told so
                node.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {node, server}
            for pair in ((node, server, True), (server, node, False)):
                threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    if up:
                        self.up += len(data)
                    else:
                        self.down += len(data)
                target.sendall(data)
        with self._lock:
            self._open -= {source, target}
        _close(source)
        _close(target)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
