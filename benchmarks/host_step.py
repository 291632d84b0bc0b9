"""Milliseconds per training step: the emitted C against PyTorch eager, one thread each, one run.

    python benchmarks/host_step.py [--json FILE] [--rounds 7] [--nets mcunet-5fps ...]

Three microcontroller backbones (3 x 128 x 128, 10 classes, cross-entropy, SGD, batch 1) and four
updates.  The C is the shared library of the emitted folder, built for this machine; PyTorch runs
the same selection with requires_grad, and stops at the deepest trained layer as autograd does.
Rounds of both alternate, and the median over all steps counts.  Peak RSS is that of a process of
its own: the emitted host executable, which trains the net on a few samples, and a Python process
that does the same in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import backbones
import numpy as np
import torch

import modicum as mo

UPDATES = {
    "head": mo.Last(n=1),
    "bias": mo.Bias(),
    "last 6 blocks": mo.Last(n=19),
    "all": mo.Full(),
}
SHAPE = (3, 128, 128)
LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15, help="steps per round")
    parser.add_argument("--nets", nargs="*", default=list(backbones.NAMES))
    parser.add_argument("--torch-only", help=argparse.SUPPRESS)  # a process that measures its RSS
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.torch_only:
        net, update = args.torch_only.split(",")
        _torch_process(net, update)
        return
    rows = []
    print(f"{'net':<16}{'update':<15}{'C ms':>8}{'torch ms':>10}{'ratio':>8}"
          f"{'C RSS MB':>10}{'torch RSS MB':>14}{'saved KiB':>11}")  # fmt: skip
    for net in args.nets:
        for update in UPDATES:
            row = measure(net, update, args.rounds, args.steps)
            rows.append(row)
            print(f"{net:<16}{update:<15}{row['c_ms']:>8.2f}{row['torch_ms']:>10.2f}"
                  f"{row['ratio']:>8.2f}{row['c_rss_mb']:>10.1f}{row['torch_rss_mb']:>14.1f}"
                  f"{row['saved_kib']:>11.1f}", flush=True)  # fmt: skip
    if args.json:
        about = {
            "command": "python benchmarks/host_step.py --json " + args.json.name,
            "machine": platform.machine(), "torch": torch.__version__, "threads": 1,
            "rounds": args.rounds, "steps": args.steps,
        }  # fmt: skip
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def measure(net: str, update: str, rounds: int, steps: int) -> dict:
    model = backbones.load(net)
    plan = mo.plan(
        mo.capture(model, torch.zeros(1, *SHAPE)), "host", UPDATES[update], mo.SGD(lr=LR)
    )
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (8, *SHAPE)).astype(np.float32)
    labels = np.arange(8) % 10
    with tempfile.TemporaryDirectory() as scratch:
        folder = mo.emit(model, plan, Path(scratch) / "c")
        native = mo.Native(folder)
        run = mo.run(folder, "host", train=(images, labels), parity=False)
        step = torch_step(model, plan)
        nhwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        c_times: list[float] = []
        torch_times: list[float] = []
        for _ in range(rounds):
            c_times += _times(lambda i: native.train(nhwc[i % 8], labels[i % 8]), steps)
            torch_times += _times(lambda i: step(images[i % 8], labels[i % 8]), steps)
    c_ms, torch_ms = 1e3 * float(np.median(c_times)), 1e3 * float(np.median(torch_times))
    low, high = (1e3 * float(np.percentile(c_times, q)) for q in (25, 75))
    return {
        "net": net, "update": update, "c_ms": c_ms, "c_ms_quartiles": [low, high],
        "torch_ms": torch_ms, "ratio": torch_ms / c_ms,
        "c_rss_mb": run.figures["peak_rss"] / 1e6, "torch_rss_mb": _torch_rss(net, update),
        "arena_kib": plan.cost.arena / 1024, "saved_kib": plan.cost.saved / 1024,
        "macs_forward": plan.cost.macs_forward, "macs_backward": plan.cost.macs_backward,
    }  # fmt: skip


def torch_step(model: torch.nn.Module, plan: mo.Plan):
    trained = {u.param for u in plan.selection.updates}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, LR)

    def step(image: np.ndarray, label: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        out = model(torch.from_numpy(image)[None])
        loss = torch.nn.functional.cross_entropy(out, torch.tensor([int(label)]))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _times(step, n: int) -> list[float]:
    for i in range(3):
        step(i)
    times = []
    for i in range(n):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    return times


def _torch_rss(net: str, update: str) -> float:
    command = [sys.executable, __file__, "--torch-only", f"{net},{update}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _torch_process(net: str, update: str) -> None:
    model = backbones.load(net)
    names = [n for n, _ in model.named_parameters()]
    layers = [n for n in names if n.endswith("weight")]
    if update == "all":
        keep = set(names)
    elif update == "bias":
        keep = {n for n in names if n.endswith("bias") or n.startswith("classifier")}
    else:
        last = layers[-1:] if update == "head" else layers[-19:]
        keep = {n for n in names if n.rpartition(".")[0] + ".weight" in last}
    for name, p in model.named_parameters():
        p.requires_grad_(name in keep)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LR)
    for i in range(8):
        optimizer.zero_grad(set_to_none=True)
        out = model(torch.zeros(1, *SHAPE))
        torch.nn.functional.cross_entropy(out, torch.tensor([i])).backward()
        optimizer.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main()
