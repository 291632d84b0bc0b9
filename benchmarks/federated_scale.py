"""How many clients one machine simulates: clients per second, and what the server keeps in memory.

    python benchmarks/federated_scale.py --json FILE

TinyMetaFed on the sine net, 50 clients a round, 20 rounds, on Flower's simulation engine with two
workers of Ray; once with 100 clients in all and once with 1,000.  Each federation runs in a process
of its own, which is the server, and stands for all nodes: Flower keeps their contexts there.  The
emitted C that clients train in is built before.  `server` is the resident memory of that process:
before the simulation (Python, PyTorch, Flower), after the last round, and at most; `all` the peak
of the sum over it and all processes of Ray, shared pages counted once.  Seconds are those of the
clock; clients per second those of all rounds but the first, for which Ray starts its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROUNDS, EACH, SIZES, CPUS = 20, 50, (100, 1000), 2
RULE = json.dumps({"kind": "tinymetafed", "clients": EACH})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.one:
        print(json.dumps(federation(args.one, args.cache)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for clients in SIZES:
            command = [sys.executable, __file__, "--one", str(clients), "--cache", cache]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(rows[-1]), flush=True)
    grown = rows[-1]["server_end_bytes"] - rows[0]["server_end_bytes"]
    each = grown / (SIZES[-1] - SIZES[0])
    print(f"the server has {grown / 1e6:.1f} MB more, {each / 1e3:.1f} kB for each client more")
    made = {
        "command": "python benchmarks/federated_scale.py",
        "python": platform.python_version(),
        **{name: version(name) for name in ("flwr", "ray", "torch")},
        "cpus": CPUS, "rounds": ROUNDS, "clients_a_round": EACH, "rule": json.loads(RULE),
        "load_average": os.getloadavg(), "nice": os.nice(0),
        "rows": rows,
        "server_bytes_for_each_client": each,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    mb = {k.removesuffix("_bytes"): v / 1e6 for k, v in row.items() if k.endswith("_bytes")}
    return (
        f"{row['clients']:5} clients: {row['clients_per_second']:.1f} clients/s in "
        f"{row['rounds_s']:.0f} s of rounds, {row['start_s']:.0f} s to the first, "
        f"{row['wall_s']:.0f} s in all; server {mb['server_end']:.0f} MB "
        f"({mb['server_before']:.0f} before, {mb['server']:.0f} at most), all {mb['all']:.0f} MB"
    )


def federation(clients: int, cache: str) -> dict[str, Any]:
    """One federation in this process."""
    from modicum.federated.app.task import Settings, site_of
    from modicum.federated.simulate import simulate

    settings = Settings(
        clients=clients,
        rounds=ROUNDS,
        rule=RULE,
        learner="native",
        cache=cache,
        seed=1,
        wait=900,
    )
    assert site_of(settings.config(), {"partition-id": 0}).training.layout.size  # builds the C
    ends: list[float] = []
    memory: list[int] = []

    def on_round(log: Any) -> None:
        ends.append(time.monotonic())
        memory.append(of_this("VmRSS"))

    before = of_this("VmRSS")
    with Sampled() as sampled:
        start = time.monotonic()
        done = simulate(settings, cpus=CPUS, on_round=on_round)
        wall = time.monotonic() - start
    assert [len(r.used) for r in done.rounds] == [EACH] * ROUNDS
    rounds = ends[-1] - ends[0]  # the first one's end is where the clock of the others starts
    return {
        "clients": clients, "wall_s": wall, "start_s": ends[0] - start, "rounds_s": rounds,
        "clients_per_second": EACH * (ROUNDS - 1) / rounds,
        "server_before_bytes": before, "server_end_bytes": memory[-1],
        "server_bytes": of_this("VmHWM"), "all_bytes": sampled.peak,
        "codec_bytes_up": sum(r.bytes_up for r in done.rounds),
        "codec_bytes_down": sum(r.bytes_down for r in done.rounds),
        "loss": [r.loss for r in done.rounds],
    }  # fmt: skip


class Sampled:
    """The most memory that this process and its descendants had, looked at twice a second."""

    def __enter__(self) -> Sampled:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.5):
            self.peak = max(self.peak, sum(map(proportional, family(os.getpid()))))


def of_this(name: str) -> int:
    """Resident bytes of this process, VmRSS, or VmHWM: at most so far."""
    return field(Path("/proc/self/status").read_text(), name)


def proportional(pid: int) -> int:
    """Resident bytes of a process, a page that n processes share as an n-th; 0 if it has ended."""
    try:
        return field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")
    except OSError:
        return 0


def field(text: str, name: str) -> int:
    return next(1024 * int(x.split()[1]) for x in text.splitlines() if x.startswith(name + ":"))


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = {pid}, {pid}
    while new:
        new = {p for p, parent in parents.items() if parent in new} - found
        found |= new
    return found


if __name__ == "__main__":
    main()
