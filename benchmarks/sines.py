"""Regression of sines from 10 points: mean squared error after 0 to 10 inner steps.

    python benchmarks/sines.py --json FILE

The task of Finn et al. (ICML 2017, 5.1): amplitudes from 0.1 to 5, phases from 0 to pi, 10 points
to learn from; 1-40-40-1 with ReLU.  25 tasks an update, 600 test tasks.  Every finished training is
a folder below --out (default: ~/.cache/modicum/sines); one that was stopped goes on.  FILE keeps
the rows of other rules.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch

from modicum.meta import (
    MAML,
    MAMLPP,
    MetaTrain,
    PMeta,
    Reptile,
    Sines,
    judge,
    load_learner,
    metatrain,
)
from modicum.models import SineNet

RULES = {
    "MAML": MAML(steps=5, rate=0.01),
    "MAML++": MAMLPP(steps=5, rate=0.01, norms="batch"),
    "p-Meta": PMeta(steps=5, rate=0.01, share=0.6),
    "Reptile": Reptile(steps=10, rate=0.02, judged=10),
}
STEPS = (0, 1, 2, 5, 10)
EPISODES, TASKS = 5000, 25  # of an epoch, and of an update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", default="", help="some of them: a;b")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "modicum" / "sines")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for label, rule in RULES.items():
        if args.rules and label not in args.rules.split(";"):
            continue
        curves = [trained(args, label, rule, seed) for seed in range(args.seeds)]
        mean, spread = np.mean(curves, 0), np.std(curves, 0, ddof=1) if len(curves) > 1 else None
        half = None if spread is None else 1.96 * spread / len(curves) ** 0.5
        shown = {
            f"after {k}": f"{mean[i]:.3f}" + ("" if half is None else f" ± {half[i]:.3f}")
            for i, k in enumerate(STEPS)
        }
        updates = args.epochs * EPISODES // TASKS
        rows.append({"rule": label, "seeds": len(curves), "updates": updates, **shown})
        print(f"{label:8} " + "  ".join(f"{k}: {v}" for k, v in shown.items()))
    if args.json:
        new = {row["rule"] for row in rows}
        old = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        rows = sorted(
            [*rows, *(row for row in old if row["rule"] not in new)],
            key=lambda row: [*RULES].index(row["rule"]),
        )
        made = {
            "command": f"python benchmarks/sines.py --json {args.json.name}",
            "python": platform.python_version(), "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def trained(args: argparse.Namespace, label: str, rule, seed: int) -> list[float]:
    """The mean error on 600 test tasks after so many inner steps."""
    folder = args.out / f"{label}-{args.epochs}-{seed}"
    torch.manual_seed(seed)
    net = SineNet()
    reptile = isinstance(rule, Reptile)
    config = MetaTrain(
        rule=rule, epochs=args.epochs, episodes=EPISODES, tasks=TASKS, together=TASKS, seed=seed,
        **({"rate": 0.5} if reptile else {"rate": 2e-3}), validation=100,
    )  # fmt: skip
    metatrain(net, Sines(), None, config, out=folder, validation=Sines(), progress=True)
    _, learner = load_learner(net, folder / "learner.pt")
    errors = []
    for learner.judged in STEPS:
        errors.append(float(np.mean(judge(learner, Sines(queries=50), 600))))
    return errors


if __name__ == "__main__":
    main()
