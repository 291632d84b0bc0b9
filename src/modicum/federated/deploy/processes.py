"""Flower's programs: their command lines and environment, and stopping all that were started."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.errors import InvalidInput, ToolMissing
from modicum.federated.deploy.keys import CA, CERTIFICATE, KEY
from modicum.federated.flower import QUIET

PORT = 8000
"""Of the server, where Flower has it: nodes, `flwr`, and the server's own processes use it."""
NODE_PORT = 9094
"""Of a node's own processes, on its loopback interface; a second node on a machine has another."""


def superlink(
    folder: Path, host: str = "0.0.0.0", port: int = PORT, database: str | Path | None = None
) -> list[str]:
    """The server, with the certificates of `folder`; it lets in only nodes that are registered.

    Without a `database` it knows runs and nodes until it ends.
    """
    command = [
        program("flower-superlink"),
        *("--ssl-ca-certfile", str(folder / CA)),
        *("--ssl-certfile", str(folder / CERTIFICATE), "--ssl-keyfile", str(folder / KEY)),
        "--enable-supernode-auth",
        *("--host", host, "--port", str(port)),
    ]
    return command + (["--database", str(database)] if database else [])


def supernode(
    server: str,
    ca: Path,
    key: Path,
    config: Mapping[str, Any],
    port: int = NODE_PORT,
    retries: int | None = None,
) -> list[str]:
    """A node, which trusts the authority `ca`, and proves by its `key` that it is registered.

    `server` is host:port; `config` the node config, which has to have `partition-id`.  Without
    `retries` it tries for ever to reach the server.
    """
    if "partition-id" not in config:
        raise InvalidInput("a node config has a partition-id", hint="0, 1, 2, ... by node")
    command = [
        program("flower-supernode"), "--superlink", server, "--root-certificates", str(ca),
        "--auth-supernode-private-key", str(key), "--node-config", pairs(config),
        "--port", str(port),
    ]  # fmt: skip
    return command + ([] if retries is None else ["--max-retries", str(retries)])


def program(name: str) -> str:
    """One of Flower's programs: of this environment, or from the PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed", hint="pip install 'modicum[federated]'")
    return found


def environment(home: str | Path) -> dict[str, str]:
    """Of all of Flower's programs: nothing reported, nothing installed, its files in `home`.

    They start one another by name, so this environment's come first on the PATH.  PyTorch has one
    thread, unless OMP_NUM_THREADS says otherwise: sums come out in one order, and for nets of this
    size more threads are slower.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    mine = {**QUIET, "FLWR_HOME": str(Path(home).resolve()), "PATH": path}
    return {"OMP_NUM_THREADS": "1", **os.environ, **mine}


def connect(home: Path, server: str, ca: Path) -> None:
    """Tell `flwr` of this home where the server is, and which authority to trust."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "federation"\n\n[superlink.federation]\n'
        f"address = {quoted(server)}\nroot-certificates = {quoted(str(ca.resolve()))}\n"
    )


def pairs(config: Mapping[str, Any]) -> str:
    """Values as Flower's command lines take them: TOML, with spaces between.

    >>> pairs({"partition-id": 0, "learner": "native", "judge": True})
    'partition-id=0 learner="native" judge=true'
    """
    return " ".join(f"{key}={_toml(value)}" for key, value in config.items())


def toml(config: Mapping[str, Any]) -> str:
    """The same as the lines of a file, where text may hold what it likes."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in config.items())


def quoted(text: str) -> str:
    """A string in TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    if any(ord(c) < 32 for c in text):
        raise InvalidInput(f"{text!r} has control characters")
    return f'"{escaped}"'


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (int, float)) else quoted(str(value))


@dataclass
class Started:
    """A process that was started, and the file that has what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")


TAG = "MODICUM_PROCESSES"
"""The environment variable by which what was started is found again."""


class Processes:
    """Starts programs, and stops them and all that they have started, whatever happens (Linux)."""

    def __init__(self, environment: Mapping[str, str], patience: float = 10.0) -> None:
        self.patience = patience
        self.tag = secrets.token_hex(8)
        self.environment = {**environment, TAG: self.tag}
        self.running: list[Started] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, command: Sequence[str], log: Path) -> Started:
        """Run a program in the background; what it prints goes to a file."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=self.environment, start_new_session=True,  # Ctrl-C is for this process alone
            )  # fmt: skip
        self.running.append(Started(process, log))
        return self.running[-1]

    def stop(self) -> None:
        """Stop all that was started, and all that it has started."""
        stop_tagged(self.tag, self.patience)
        for started in self.running:
            started.process.wait()
        self.running.clear()


def stop_tagged(tag: str, patience: float) -> None:
    """Ask the processes of a tag to end, wait for so many seconds, and then end them."""
    asked: set[int] = set()
    until = time.monotonic() + patience
    while ours := tagged(tag):
        late = time.monotonic() > until
        for pid in ours if late else ours - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= ours
        time.sleep(0.1)


def tagged(tag: str) -> set[int]:
    """The processes that have this tag in their environment, wherever it came from.

    Parents and groups do not tell: Flower's server starts processes in a session of their own, and
    those of a node outlive it.  What has ended has no environment.
    """
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if entry.name.isdigit() and f"{TAG}={tag}".encode() in (
                (entry / "environ").read_bytes().split(b"\0")
            ):
                found.add(int(entry.name))
    return found
