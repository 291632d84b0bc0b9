"""A whole deployment on this machine: a server with TLS, and nodes, over the loopback interface."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from modicum.errors import ModicumError
from modicum.federated.deploy.keys import CA, make_certificates, make_node_key
from modicum.federated.deploy.processes import (
    Processes,
    Started,
    connect,
    environment,
    program,
    superlink,
    supernode,
    toml,
)

APP = Path(__file__).resolve().parent.parent / "app"
"""The app that is submitted."""
HOST = "127.0.0.1"
LOOK_S = 60.0
"""Seconds between looks at a run that, by the server's log, is not over; each starts Python."""


class Loopback:
    """A server that runs from ``with`` on, and what was started for it until then.

    `folder` gets certificates, keys, logs and Flower's own files.

    >>> with Loopback("fleet/") as fleet:                        # doctest: +SKIP
    ...     fleet.add_node({"partition-id": 0})
    ...     fleet.await_nodes()
    ...     fleet.wait(fleet.submit(Settings(clients=1).config()))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.port = free_port()
        self.nodes: list[Started] = []
        self._env = environment(self.folder / "flower")

    def __enter__(self) -> Loopback:
        with ExitStack() as stack:
            ca = make_certificates(self.folder, [HOST, "localhost"])
            connect(self.folder / "flower", f"{HOST}:{self.port}", ca)
            self._processes = stack.enter_context(Processes(self._env))
            self.server = self._processes.start(
                superlink(self.folder, HOST, self.port), self.folder / "server.log"
            )
            self._await_server()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add_node(self, config: Mapping[str, Any], port: int | None = None) -> Started:
        """A node with a key that is registered; `port` of the server, where it is another."""
        key = self.folder / f"node-{len(self.nodes)}"
        self.register(make_node_key(key))
        return self.start_node(config, key, self.folder / CA, port)

    def register(self, public: Path) -> None:
        """Let a node in that has this key."""
        self.flwr("supernode", "register", str(public), "federation")

    def start_node(
        self,
        config: Mapping[str, Any],
        key: Path,
        ca: Path,
        port: int | None = None,
        retries: int | None = None,
    ) -> Started:
        """A node, registered or not."""
        command = supernode(f"{HOST}:{port or self.port}", ca, key, config, free_port(), retries)
        log = self.folder / f"{key.name}-{len(self.nodes)}.log"
        self.nodes.append(self._processes.start(command, log))
        return self.nodes[-1]

    def await_nodes(self, timeout: float = 120.0) -> None:
        """Until the server has let in all nodes.  Raises ModicumError for one that it refuses."""
        until = time.monotonic() + timeout
        for node in self.nodes:
            while "SuperNode ID:" not in node.said():
                if node.process.poll() is not None:
                    why = [line for line in node.said().splitlines() if line.strip()]
                    raise ModicumError("a node has ended", where=str(node.log), why=why[-12:])
                if time.monotonic() > until:
                    raise ModicumError(f"a node is not in after {timeout:g} s", where=str(node.log))
                time.sleep(0.2)

    def submit(self, run_config: Mapping[str, Any]) -> int:
        """Start a run of the app; returns its number."""
        file = self.folder / "run.toml"
        file.write_text(toml(run_config))
        said = self.flwr("run", str(APP), "federation", "--run-config", str(file))
        return int(said["run-id"])

    def wait(self, run: int, timeout: float = 3600.0) -> None:
        """Until a run is over.  Raises ModicumError where it fails, or takes longer."""
        until = time.monotonic() + timeout
        over = re.compile(rf"Finished task \d+ of run {run}\b")
        next_look = time.monotonic() + LOOK_S
        while time.monotonic() < until:
            if self.server.process.poll() is not None:
                raise ModicumError("the server has ended", where=str(self.server.log))
            if time.monotonic() > next_look or over.search(self.server.said()):
                found = self.flwr("list", "federation", "--run-id", str(run))["runs"][0]
                next_look = time.monotonic() + LOOK_S
                if found["status"] == "finished:completed":
                    return
                if found["status"].startswith("finished"):
                    why = found["status-details"]
                    raise ModicumError(f"the run ended as {found['status']}", why=why)
            time.sleep(0.2)
        raise ModicumError(f"the run is not over after {timeout:g} s", where=str(self.server.log))

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of Flower's answers, as JSON."""
        done = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"], env=self._env, check=False,
            capture_output=True, text=True, timeout=120, cwd=self.folder,
        )  # fmt: skip
        text = done.stdout[done.stdout.find("{") :]  # lines for people may come first
        try:
            said: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            said = {}
        if done.returncode or not said.get("success"):
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise ModicumError(f"flwr {arguments[0]} failed", why=lines[-12:])
        return said

    def _await_server(self, timeout: float = 120.0) -> None:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self.server.process.poll() is not None:
                lines = self.server.said().splitlines()
                raise ModicumError("the server does not start", why=lines[-12:])
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.2)
                continue
            return
        raise ModicumError(f"the server does not answer after {timeout:g} s")


def free_port() -> int:
    """A port of the loopback interface that nobody has."""
    with socket.create_server((HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
