"""Accuracy against memory for every method on one dataset: a table and a picture.

    python benchmarks/pareto.py [--out DIR] [--json FILE] [--picture FILE.svg]

mbv2-w0.35 with its ImageNet weights on CIFAR-10 (600 training and 100 test images a class) at
96 x 96, padded crops and flips, batch 8, 2 epochs = 1,500 steps of Adam with a cosine
schedule, three seeds.  Each method takes the learning rate of 0.0003 and 0.001 that does better on
a fifth of the training set.  The runs are resumable: each is a file under --out.  Weights and
images are looked for in the folder MODICUM_SHARED.  About 40 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import backbones
import torch

import modicum as mo
from modicum.comparison import compare_methods
from modicum.methods import Method
from modicum.models import MODELS
from modicum.tasks import Augment, Preprocess, load

NAME, SIZE = "mbv2-w0.35", 96
METHODS: dict[str, Method] = {
    "last layer": mo.Last(),
    "bias": mo.Bias(),
    "TinyTL-L": mo.TinyTL(mode="lite"),
    "TinyTL-L+B": mo.TinyTL(mode="lite+bias"),
    **{f"MobileTL {n}": mo.MobileTL(blocks=n) for n in (1, 3, 5)},
    "exact 3": mo.Blocks(blocks=3),
    "all": mo.Full(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/pareto"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="copy the picture here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mean, std = MODELS[NAME].normalise
    made = compare_methods(
        lambda: backbones.load(NAME, seed=torch.initial_seed()),
        METHODS,
        load(backbones.SHARED / "data" / "cifar10_train.zip"),
        load(backbones.SHARED / "data" / "cifar10_test.zip"),
        Preprocess(size=SIZE, mean=mean, std=std),
        out=args.out,
        seeds=(0, 1, 2),
        epochs=2,
        batch=8,
        optimizer=mo.Adam(),
        rates=(3e-4, 1e-3),
        augment=Augment(crop="pad"),
        progress=True,
    )
    print(made)
    if args.picture:
        shutil.copy(args.out / "comparison.svg", args.picture)
    if args.json:
        rows = [
            {
                "method": row.label,
                "accuracy": 100 * row.accuracy,
                "interval": 100 * (row.interval or 0.0),
                "saved_kib": row.saved_batch / 1024,
                "memory_kib": row.memory / 1024,
                "dynamic_kib": row.dynamic / 1024,
                "ram_kib": row.ram / 1024,
                "backward": row.macs_backward,
                "step_ms": 1e3 * row.seconds_per_step,
                "rate": row.rate,
                "accuracies": row.accuracies,
            }
            for row in made.rows
        ]
        command = "python benchmarks/pareto.py --json pareto.json --picture pareto.svg"
        data = {"command": command, "torch": torch.__version__, "seeds": 3, "rows": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
