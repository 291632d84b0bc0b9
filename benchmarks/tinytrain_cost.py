"""Backward memory, MACs and step times of TinyTrain beside its baselines: the papers' table 2.

    python benchmarks/tinytrain_cost.py [--json FILE] [--nets mcunet-5fps ...] [--no-times]

Backbones with ImageNet weights, 3 x 128 x 128, Adam.  The support set that TinyTrain sees is 25
traffic signs of 5 classes.  Memory in the papers' convention is max(largest input + output, kept)
+ 16 bytes for each trained parameter, for one sample (the papers count 100 for all, TinyTL).
"by plan" is what the plan says; "measured" takes the kept bytes from saved_tensors_hooks, the
trained parameters from the optimiser's states after a step, and the MACs from the shapes of the
tensors that pass through every convolution_backward and mm of the backward pass.

Step times: PyTorch, Tuned under the plan, batch 25; and the emitted C, one sample, SGD, whose
backward part is a step less a prediction.  One thread, rounds of both alternate, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import backbones
import numpy as np
import torch
import torch.nn.functional as F
from mobiletl_memory import held
from tinytrain import BUDGET, SCHEMES, classes, preprocess, shared
from torch.utils._python_dispatch import TorchDispatchMode

import modicum as mo
from modicum.apply import Tuned
from modicum.backward_cost import backward_cost, io_peak
from modicum.heads import few_shot, with_ways
from modicum.lite import prepare_model
from modicum.lower import prepare
from modicum.methods import Full, Last, Method, ObservingMethod, SparseUpdate, TinyTL, TinyTrain
from modicum.observe import inspection, observe
from modicum.tasks import FixedEpisodes, arrays, draw_task

MB = 1 << 20
PAPER = {  # table 2: MB, M MACs; all and TinyTL for a batch of 100
    "mcunet-5fps": {"all": (906, 44.9), "last": (2.03, 1.57), "tinytl": (542, 26.4),
                    "sparse_update": (1.43, 11.9), "tinytrain": (0.89, 6.51)},
    "mbv2-w0.35": {"all": (1049, 34.9), "last": (1.64, 0.80), "tinytl": (587, 16.4),
                   "sparse_update": (2.08, 8.10), "tinytrain": (1.06, 4.90)},
    "proxyless-w0.3": {"all": (857, 38.4), "last": (1.06, 0.59), "tinytl": (541, 17.8),
                       "sparse_update": (1.74, 7.60), "tinytrain": (0.78, 5.00)},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--nets", nargs="*", default=list(backbones.NAMES))
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, times = [], []
    print(f"{'':16}{'':15}{'trained':>9}{'by plan MB':>12}{'measured':>10}{'paper':>8}"
          f"{'by plan M':>11}{'measured':>10}{'paper':>7}{'kept KB':>9}"
          f"{'plan RAM KB':>12}")  # fmt: skip
    for name in args.nets:
        bench = Bench(name)
        for label, method in methods(name).items():
            row = bench.row(label, method)
            rows.append(row)
            print(f"{name:16}{label:15}{row['trained']:>9,}{row['memory_mb']:>12.3f}"
                  f"{row['measured_mb']:>10.3f}{row['paper_mb']:>8}"
                  f"{row['macs'] / 1e6:>11.2f}{row['macs_measured'] / 1e6:>10.2f}"
                  f"{row['paper_macs']:>7}{row['kept_kb']:>9.1f}"
                  f"{row['ram_kb']:>12.1f}", flush=True)  # fmt: skip
        rows.append(bench.inspection_row())
        if not args.no_times:
            times.append(bench.times(args.rounds))
            for key, value in times[-1].items():
                print(f"  {key}: {value}")
    if args.json:
        about = {
            "command": " ".join(["python benchmarks/tinytrain_cost.py --json", args.json.name,
                                 *(["--no-times"] if args.no_times else [])]),
            "machine": platform.machine(), "torch": torch.__version__, "threads": 1,
        }  # fmt: skip
        args.json.write_text(json.dumps({**about, "rows": rows, "times": times}, indent=1) + "\n")


def methods(name: str) -> dict[str, Method]:
    return {
        "all": Full(), "last": Last(), "tinytl": TinyTL(),
        "sparse_update": SparseUpdate(scheme=SCHEMES[name]),
        "tinytrain": TinyTrain(ram=BUDGET[name]),
    }  # fmt: skip


class Bench:
    """One backbone with a task."""

    def __init__(self, name: str) -> None:
        self.name = name
        rule = FixedEpisodes(ways=5, shots=5, queries=10)
        task = draw_task(classes(shared("traffic_signs.zip"), 13, None), rule, seed=0, index=0)
        self.support = arrays(task.support, preprocess(name, 128))
        self.net = few_shot(backbones.load(name, classes=None), 5).eval()
        self.example = torch.zeros(1, 3, 128, 128)
        self.graph = with_ways(mo.capture(self.net, self.example), 5)
        self.x = torch.from_numpy(self.support[0])
        self.y = torch.from_numpy(self.support[1])

    def plan(self, method: Method, optimizer: Any) -> tuple[torch.nn.Module, mo.Plan]:
        net = prepare_model(self.net, self.example, method)
        graph = self.graph if net is self.net else mo.capture(net, self.example)
        seen = None
        if isinstance(method, ObservingMethod):
            seen = observe(net, graph, method, self.support)
        return net, mo.plan(graph, None, method, optimizer, samples=seen)

    def row(self, label: str, method: Method) -> dict[str, Any]:
        net, plan = self.plan(method, mo.Adam(lr=1e-3))
        cost = backward_cost(plan.graph, plan.selection, plan.optimizer)
        tuned = Tuned(net, plan)
        tuned.refresh(self.x, self.y)
        optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
        kept = held(tuned, self.x[:1])
        loss = F.cross_entropy(tuned(self.x[:1]), self.y[:1])
        with Macs() as counted:
            loss.backward()
        optimizer.step()
        states = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
        floats = sum(p.numel() + p.grad.numel() for p in tuned.parameters())
        floats += sum(t.numel() for t in states)
        paper = PAPER[self.name][label]
        measured = max(io_peak(prepare(plan.graph, plan.selection)), kept) + 4 * floats
        return {
            "net": self.name, "method": label, "config": method.model_dump(mode="json"),
            "trained": cost.updated, "io": cost.io, "kept_measured": kept,
            "batch_100_mb": cost.batch_memory(100) / MB, "measured_mb": measured / MB,
            "macs": cost.macs, "macs_measured": counted.macs,
            "memory_mb": cost.memory / MB,
            "kept_kb": plan.cost.saved / 1024, "dynamic_kb": dynamic(plan) / 1024,
            "ram_kb": plan.cost.ram / 1024,
            "paper_mb": paper[0], "paper_macs": paper[1],
        }  # fmt: skip

    def inspection_row(self) -> dict[str, Any]:
        """What TinyTrain's own look at the samples keeps (papers' table 11)."""
        plan = inspection(self.graph, TinyTrain().probes(self.graph))
        macs = plan.cost.macs_backward
        print(f"{self.name:16}inspecting 6 blocks keeps {plan.cost.saved / 1024:.1f} KB, "
              f"{macs / 1e6:.2f} M backward MACs a sample")  # fmt: skip
        return {
            "net": self.name, "method": "scoring", "macs": macs,
            "kept_kb": plan.cost.saved / 1024, "dynamic_kb": dynamic(plan) / 1024,
            "ram_kb": plan.cost.ram / 1024,
        }  # fmt: skip

    def times(self, rounds: int) -> dict[str, Any]:
        return {"net": self.name, **self.torch_times(rounds), **self.c_times(rounds)}

    def torch_times(self, rounds: int) -> dict[str, float]:
        steps = {}
        for label in ("all", "tinytrain"):
            net, plan = self.plan(methods(self.name)[label], mo.Adam(lr=1e-4))
            tuned = Tuned(net, plan)
            tuned.refresh(self.x, self.y)
            steps[label] = torch_step(tuned, self.x, self.y)
        found = alternate(steps, rounds, 3)
        return {
            "torch_all_ms": found["all"], "torch_tinytrain_ms": found["tinytrain"],
            "torch_ratio": found["all"] / found["tinytrain"],
        }  # fmt: skip

    def c_times(self, rounds: int) -> dict[str, float]:
        image = np.ascontiguousarray(self.support[0][0].transpose(1, 2, 0))
        steps: dict[str, Any] = {}
        macs: dict[str, tuple[int, int]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for label in ("all", "tinytrain"):
                net, plan = self.plan(methods(self.name)[label], mo.SGD(lr=1e-5))
                native = mo.Native(mo.emit(net, plan, Path(scratch) / label, data=self.support))
                steps[label] = lambda n=native: n.train(image, 0)
                steps[f"{label} forward"] = lambda n=native: n.predict(image)
                macs[label] = plan.cost.macs_forward, plan.cost.macs_backward
            found = alternate(steps, rounds, 15)
        whole = {label: found[label] for label in ("all", "tinytrain")}
        back = {label: found[label] - found[f"{label} forward"] for label in whole}
        return {
            **{f"c_{label}_ms": ms for label, ms in whole.items()},
            **{f"c_{label}_backward_ms": ms for label, ms in back.items()},
            "c_ratio": whole["all"] / whole["tinytrain"],
            "c_backward_ratio": back["all"] / back["tinytrain"],
            "macs_ratio": sum(macs["all"]) / sum(macs["tinytrain"]),
            "macs_backward_ratio": macs["all"][1] / macs["tinytrain"][1],
        }


def dynamic(plan: mo.Plan) -> int:
    c = plan.cost
    return c.arena - c.trained_bytes - c.optimizer_bytes - c.accumulator_bytes


class Macs(TorchDispatchMode):
    """Counts multiply-accumulates from the shapes of what passes; of convolutions and products."""

    macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution_backward":
            dy, _, weight = args[:3]
            dx, dw = out[0], out[1]
            if dx is not None:  # each dy goes to every tap and input channel of its group
                self.macs += dy.numel() * math.prod(weight.shape[1:])
            if dw is not None:  # each entry of dw sums over samples and pixels
                self.macs += dw.numel() * dy.shape[0] * math.prod(dy.shape[2:])
        elif name in ("mm", "addmm"):
            a, b = args[-2:]
            self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        return out


def torch_step(tuned: Tuned, x: torch.Tensor, y: torch.Tensor) -> Any:
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(tuned(x), y).backward()
        optimizer.step()

    return step


def alternate(steps: dict[str, Any], rounds: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, one after another in every round."""
    found: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            step()
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                found[label].append(1e3 * (time.perf_counter() - start))
    return {label: float(np.median(values)) for label, values in found.items()}


if __name__ == "__main__":
    main()
