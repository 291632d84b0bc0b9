"""Executed instructions and RAM per training step on three emulated Cortex-M cores.

    python benchmarks/mcu_step.py [--json FILE] [--nets mcunet-5fps ...] [--cores m4f m7 m55]

The three backbones (3 x 128 x 128, float32, batch 1, SGD) with the updates that fit the 4 MB of RAM
that the emulated machines have.  QEMU counts instructions; it gives no time.  RAM is what was
measured: arena high water + .data + .bss + stack high water.  Rows already in FILE are kept, so an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import backbones
import numpy as np
import torch
from host_step import SHAPE, UPDATES

import modicum as mo

RAM = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here, and resume from it")
    parser.add_argument("--nets", nargs="*", default=list(backbones.NAMES))
    parser.add_argument("--cores", nargs="*", default=["m4f", "m7", "m55"])
    args = parser.parse_args()
    rows = []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    done = {(r["net"], r["update"], r["core"]) for r in rows}
    print(f"{'net':<16}{'update':<15}{'core':<6}{'M instr/step':>13}{'inference':>11}"
          f"{'instr/MAC':>11}{'RAM KiB':>10}{'planned':>9}{'stack B':>9}")  # fmt: skip
    for row in rows:
        show(row)
    for net in args.nets:
        for update in UPDATES:
            missing = [c for c in args.cores if (net, update, c) not in done]
            for row in measure(net, update, missing) if missing else ():
                rows.append(row)
                show(row)
                if args.json:
                    command = "python benchmarks/mcu_step.py --json " + args.json.name
                    text = json.dumps({"command": command, "rows": rows}, indent=1)
                    args.json.write_text(text + "\n")


def show(r: dict) -> None:
    if "why" in r:
        print(f"{r['net']:<16}{r['update']:<15}{r['core']:<6}  {r['why']}", flush=True)
        return
    print(f"{r['net']:<16}{r['update']:<15}{r['core']:<6}{r['train'] / 1e6:>13.1f}"
          f"{r['predict'] / 1e6:>11.1f}{r['per_mac']:>11.2f}{r['ram'] / 1024:>10.1f}"
          f"{r['ram_planned'] / 1024:>9.1f}{r['stack']:>9.0f}", flush=True)  # fmt: skip


def measure(net: str, update: str, cores: list[str]):
    model = backbones.load(net)
    graph = mo.capture(model, torch.zeros(1, *SHAPE))
    try:
        plan = mo.plan(graph, "corstone300", UPDATES[update], mo.SGD(lr=1e-4), ram=RAM - 16384)
    except mo.DoesNotFit as error:
        for core in cores:
            yield {"net": net, "update": update, "core": core, "why": error.what}
        return
    rng = np.random.default_rng(0)
    train = (rng.uniform(-1, 1, (2, *SHAPE)).astype(np.float32), np.arange(2))
    macs = plan.cost.macs_forward + plan.cost.macs_backward
    with tempfile.TemporaryDirectory() as scratch:
        folder = mo.emit(model, plan, Path(scratch) / "c")
        for core in cores:
            f = mo.run(folder, core, train=train, test=train, parity=False).figures
            yield {
                "net": net, "update": update, "core": core, "train": f["instructions_train"],
                "predict": f["instructions_predict"], "per_mac": f["instructions_train"] / macs,
                "macs_forward": plan.cost.macs_forward, "macs_backward": plan.cost.macs_backward,
                "ram": f["ram"], "ram_planned": f["ram_planned"], "arena": f["arena_high_water"],
                "stack": f["stack_high_water"], "text": f["text"], "weights": f["weights"],
            }  # fmt: skip


if __name__ == "__main__":
    main()
