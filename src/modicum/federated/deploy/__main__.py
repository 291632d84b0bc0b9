"""What a person types on the server's machine and on the devices: see docs/federate-deploy.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from modicum.errors import ModicumError, UsageError
from modicum.federated.deploy.keys import CA, make_certificates, make_node_key
from modicum.federated.deploy.loopback import APP
from modicum.federated.deploy.processes import (
    NODE_PORT,
    PORT,
    connect,
    environment,
    program,
    superlink,
    supernode,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.  `server` and `node` become Flower's programs."""
    chosen = _parser().parse_args(arguments)
    do: Callable[[argparse.Namespace], int] = chosen.do
    try:
        return do(chosen)
    except ModicumError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m modicum.federated.deploy", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("federation"),
        help="certificates, keys, and what Flower keeps (default: federation)",
    )  # fmt: skip
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    made = verbs.add_parser("certificates", help="an authority, and a certificate for the server")
    made.add_argument("hosts", nargs="+", help="names and addresses by which nodes reach it")
    made.set_defaults(do=_certificates)

    key = verbs.add_parser("key", help="a node's key; only NAME.pub leaves the device")
    key.add_argument("name")
    key.set_defaults(do=_key)

    server = verbs.add_parser("server", help="the server, until Ctrl-C")
    server.add_argument("--host", default="0.0.0.0", help="the address that it listens on")
    server.add_argument("--port", type=int, default=PORT)
    server.set_defaults(do=_server)

    register = verbs.add_parser("register", help="let nodes in by their public keys")
    register.add_argument("keys", nargs="+", type=Path, metavar="KEY.pub")
    register.set_defaults(do=_register)

    node = verbs.add_parser("node", help="a node, until Ctrl-C")
    node.add_argument("client", type=int, help="its number, from 0 on: the node's partition-id")
    node.add_argument("--key", type=Path, help="its private key (default: node-CLIENT)")
    node.add_argument("--learner", choices=("torch", "native", "board"))
    node.add_argument("--link", help="where its board is: /dev/ttyACM0, or host:port")
    node.add_argument("--data", help="its own files")
    node.add_argument("--port", type=int, default=NODE_PORT, help="for its own processes")
    node.set_defaults(do=_node)

    run = verbs.add_parser("run", help="start a run of the app, and show its log")
    run.add_argument("config", nargs="*", help="settings, as rounds=20 clients=2 case='\"sines\"'")
    run.set_defaults(do=_run)

    for verb in (register, node, run):
        verb.add_argument("--server", default=f"localhost:{PORT}", help="host:port")
    return parser


def _certificates(chosen: argparse.Namespace) -> int:
    print(f"{make_certificates(chosen.folder, chosen.hosts)}: give it to every node")
    return 0


def _key(chosen: argparse.Namespace) -> int:
    print(f"{make_node_key(chosen.folder / chosen.name)}: give it to the server")
    return 0


def _server(chosen: argparse.Namespace) -> int:
    database = chosen.folder / "server.db"  # registered nodes and their runs outlive the server
    _become(superlink(chosen.folder, chosen.host, chosen.port, database), chosen.folder)


def _register(chosen: argparse.Namespace) -> int:
    _tell(chosen)
    for key in chosen.keys:
        code = _flwr(chosen, "supernode", "register", str(key), "federation")
        if code:
            return code
    return 0


def _node(chosen: argparse.Namespace) -> int:
    given = {name: getattr(chosen, name) for name in ("learner", "link", "data")}
    config = {"partition-id": chosen.client, **{k: v for k, v in given.items() if v is not None}}
    key = chosen.key or chosen.folder / f"node-{chosen.client}"
    _become(supernode(chosen.server, chosen.folder / CA, key, config, chosen.port), chosen.folder)


def _run(chosen: argparse.Namespace) -> int:
    _tell(chosen)
    more = ["--run-config", " ".join(chosen.config)] if chosen.config else []
    return _flwr(chosen, "run", str(APP), "federation", *more, "--stream")


def _tell(chosen: argparse.Namespace) -> None:
    ca = chosen.folder / CA
    if not ca.exists():
        raise UsageError(f"there is no {ca}", hint="`certificates`, or --folder")
    connect(_home(chosen.folder), chosen.server, ca)


def _flwr(chosen: argparse.Namespace, *arguments: str) -> int:
    command = [program("flwr"), *arguments]
    return subprocess.run(command, env=environment(_home(chosen.folder)), check=False).returncode


def _become(command: Sequence[str], folder: Path) -> NoReturn:
    os.execve(command[0], list(command), environment(_home(folder)))


def _home(folder: Path) -> Path:
    """Flower's own files."""
    return folder / "flower"


if __name__ == "__main__":
    sys.exit(main())
