"""Bytes on the wire of the deployment engine beside the codec's, and what a client's memory is.

    python benchmarks/federated_wire.py --json FILE

A server with TLS and two registered nodes on the loopback interface, TinyMetaFed on the sine net.
A relay in front of the server's port counts all that TCP carries between it and the nodes: TLS,
HTTP, Flower's messages, and the polling of nodes that wait.  One run has 1 round, one has 5: their
difference is 4 rounds, without what comes once (the app, the roll call).  The codec's bytes are
those of our messages alone.  The two are never added up.

Memory of a node: of its two processes while it waits, resident, and with shared pages divided among
those that share them; and the most that the process had which Flower starts for a message.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from federated_scale import family, field, proportional

from modicum.federated.app.task import Settings
from modicum.federated.deploy.loopback import Loopback
from modicum.federated.deploy.meter import Meter
from modicum.federated.strategy import read_history

CLIENTS, LONG, IDLE_S = 2, 5, 20.0
RULE = json.dumps({"kind": "tinymetafed", "clients": CLIENTS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "command": "python benchmarks/federated_wire.py",
            "python": platform.python_version(), "flwr": version("flwr"),
            "clients": CLIENTS, "rule": json.loads(RULE), **measured(Path(folder)),
            "load_average": os.getloadavg(),
        }  # fmt: skip
    codec, wire = made["codec_bytes"], made["wire_bytes"]
    for way in ("up", "down"):
        print(
            f"{way:5} {LONG - 1} rounds, {CLIENTS} clients: codec {codec[way]:,} bytes, "
            f"wire {wire[way]:,}; idle {made['idle_bytes_per_s'][way]:.0f} bytes/s for a node"
        )
    mb = {k: v / 1e6 for k, v in made["memory_bytes"].items()}
    print(
        f"an idle node {mb['idle_resident']:.0f} MB resident ({mb['idle_proportional']:.0f} MB "
        f"with shared pages divided), the process of a message {mb['message_peak']:.0f} MB at most"
    )
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def measured(folder: Path) -> dict[str, Any]:
    with Loopback(folder / "fleet") as fleet, Meter(fleet.port) as meter:
        for client in range(CLIENTS):
            fleet.add_node({"partition-id": client}, meter.port)
        fleet.await_nodes()
        before = meter.bytes
        time.sleep(IDLE_S)
        idle = [(b - a) / IDLE_S / CLIENTS for a, b in zip(before, meter.bytes, strict=True)]
        node = family(fleet.nodes[0].pid)
        memory = {
            "idle_resident": sum(resident(pid) for pid in node),
            "idle_proportional": sum(proportional(pid) for pid in node),
        }
        spent = []
        with Watched(fleet.nodes[0].pid, node) as watched:
            for rounds in (1, LONG):
                spent.append(one_run(fleet, meter, folder / f"out-{rounds}", rounds))
        memory["message_peak"] = watched.peak
    kinds = ("codec", "wire")
    extra = {
        kind: {way: spent[1][kind][way] - spent[0][kind][way] for way in ("up", "down")}
        for kind in kinds
    }
    return {
        "rounds": LONG - 1, "codec_bytes": extra["codec"], "wire_bytes": extra["wire"],
        "seconds": spent[1]["seconds"] - spent[0]["seconds"],
        "idle_bytes_per_s": {"up": idle[0], "down": idle[1]},
        "memory_bytes": memory, "runs": spent,
    }  # fmt: skip


def one_run(fleet: Loopback, meter: Meter, out: Path, rounds: int) -> dict[str, Any]:
    settings = Settings(clients=CLIENTS, rounds=rounds, rule=RULE, out=str(out))
    start, before = time.monotonic(), meter.bytes
    fleet.wait(fleet.submit(settings.config()))
    up, down = (b - a for a, b in zip(before, meter.bytes, strict=True))
    logs, _ = read_history(out, rounds)
    assert [len(r.used) for r in logs] == [CLIENTS] * rounds
    return {
        "rounds": rounds, "seconds": time.monotonic() - start, "wire": {"up": up, "down": down},
        "codec": {
            "up": sum(r.bytes_up for r in logs), "down": sum(r.bytes_down for r in logs),
        },
    }  # fmt: skip


class Watched:
    """The most memory of any process that a node starts."""

    def __init__(self, node: int, known: set[int]) -> None:
        self.node, self.known, self.peak = node, known, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            for pid in family(self.node) - self.known:
                self.peak = max(self.peak, resident(pid, "VmHWM"))


def resident(pid: int, name: str = "VmRSS") -> int:
    """0 for a process that has ended."""
    try:
        return field(Path(f"/proc/{pid}/status").read_text(), name)
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    main()
