"""MAML and p-Meta on policies: how much one policy-gradient step gains, and in what memory.

    python benchmarks/rl.py navigation --seeds 5 --json FILE
    python benchmarks/rl.py cheetah --json FILE                  # forwards or backwards
    python benchmarks/rl.py cheetah --task velocity ...

p-Meta may use half of the dynamic memory of MAML's inner step.  "untrained" is MAML's inner step
from the weights that the others start from, on the same tasks.  Every training has a folder below
--out (default: ~/.cache/modicum/rl) and goes on there where it was stopped; one that is done is
not made again.  --only p-meta and --first 3 share the work between processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modicum.meta import MAML, PMeta
from modicum.meta.rl import (
    RL,
    TRPO,
    Environment,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    Navigation2D,
    held_tasks,
    metatrain_rl,
    returns,
    step_costs,
)
from modicum.models import GaussianPolicy
from modicum.report.returns import Returns, mean

CACHE = Path.home() / ".cache" / "modicum" / "rl"
CHEETAHS = {"direction": HalfCheetahDirection, "velocity": HalfCheetahVelocity}
RULES = ("maml", "p-meta", "untrained")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    environment, config = setting(args)
    made = []
    for seed in range(args.first, args.first + args.seeds):
        for name in RULES:
            if not args.only or name in args.only.split(","):
                if name == "untrained":
                    made.append(untrained(args, environment, config, seed))
                else:
                    done = train(args, environment, config, name, seed)
                    made.append(row(done, environment, config))
    show(args, environment, made)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("navigation", "cheetah"))
    parser.add_argument("--task", choices=tuple(CHEETAHS), default="direction")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="maml or p-meta")
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--out", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def setting(args: argparse.Namespace) -> tuple[Environment, RL]:
    search = TRPO(conjugate=6, damping=1e-3)
    if args.verb == "navigation":
        config = RL(iterations=args.iterations or 30, tasks=12, episodes=10, outer=search)
        return Navigation2D(horizon=100), config
    config = RL(
        iterations=args.iterations or 100, tasks=8, episodes=20, discount=0.95, gae=0.95,
        outer=TRPO(kl=0.02, damping=0.1),
    )  # fmt: skip
    return CHEETAHS[args.task](horizon=100), config


def policy(environment: Environment, seed: int) -> GaussianPolicy:
    """Two layers of 100, as MAML's.  With 32 some seeds of HalfCheetah gain nothing at first."""
    torch.manual_seed(seed)
    std = 1.0 if isinstance(environment, Navigation2D) else 0.5
    return GaussianPolicy(environment.observations, environment.actions, (100, 100), std)


def rule(name: str, environment: Environment, config: RL) -> MAML | PMeta:
    """On HalfCheetah by first-order gradients: from 2,000 samples the second derivatives of an
    inner step are mostly noise.  There p-Meta begins with larger steps: it takes them in one layer.
    """
    if isinstance(environment, Navigation2D):
        maml, first = MAML(steps=1, rate=0.1), 0.1
    else:
        maml, first = MAML(steps=1, rate=0.1, order="first"), 0.2
    if name == "maml":
        return maml
    (whole,) = step_costs(maml.learner(policy(environment, 0)), environment, config)
    return PMeta(steps=1, rate=first, order=maml.order, rho=0.3, ram=whole.memory // 2)


def train(
    args: argparse.Namespace, environment: Environment, config: RL, name: str, seed: int
) -> Returns:
    folder = args.out / environment.name / f"{name}-{seed}"
    done = folder / "returns.json"
    if done.exists():
        made = Returns.load(done)
        if len(made.log) != config.iterations:
            sys.exit(f"{folder} has {len(made.log)} iterations: move it, or give --out")
        return made
    config = config.model_copy(update={"rule": rule(name, environment, config), "seed": seed})
    return metatrain_rl(policy(environment, seed), environment, config, out=folder, progress=True)


def untrained(
    args: argparse.Namespace, environment: Environment, config: RL, seed: int
) -> dict[str, Any]:
    """The row of a policy that was not meta-trained, of which a folder keeps the returns."""
    path = args.out / environment.name / f"untrained-{seed}.json"
    if not path.exists():
        config = config.model_copy(update={"seed": seed})
        tasks, rng = held_tasks(environment, config)
        learner = rule("maml", environment, config).learner(policy(environment, seed))
        scores = returns(learner, environment, config, tasks, rng).T
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores.tolist()))
    scores = np.array(json.loads(path.read_text()))
    found: dict[str, Any] = {
        "rule": "untrained", "seed": seed, "returns": [mean(s).model_dump() for s in scores],
        "gains": [mean(s - scores[0]).model_dump() for s in scores[1:]],
        "memory_share": 1.0, "macs_share": 1.0,
    }  # fmt: skip
    return found | way(found, environment, config, seed)


def way(made: dict[str, Any], environment: Environment, config: RL, seed: int) -> dict[str, Any]:
    """The share of the way to the return of who knows the goal, where that is known."""
    if not isinstance(environment, Navigation2D):
        return {}
    before, after = (m["mean"] for m in made["returns"][:2])
    tasks = held_tasks(environment, config.model_copy(update={"seed": seed}))[0]
    best = float(environment.best_returns(tasks).mean())
    return {"best": best, "way": (after - before) / (best - before)}


def row(made: Returns, environment: Environment, config: RL) -> dict[str, Any]:
    """The figures of one training."""
    cost, whole = made.costs[0], made.whole
    found: dict[str, Any] = {
        "rule": made.rule, "seed": made.seed, "returns": [m.model_dump() for m in made.means],
        "gains": [m.model_dump() for m in made.gains], "memory": cost.memory,
        "memory_share": cost.memory / whole.memory, "macs_share": cost.macs / whole.macs,
        "layers": cost.layers, "seconds": made.log[-1].seconds,
    }  # fmt: skip
    return found | way(found, environment, config, made.seed)


def show(args: argparse.Namespace, environment: Environment, rows: list[dict[str, Any]]) -> None:
    print(f"{'rule':<6}  seed  {'before':<15}  {'1 step':<15}  {'gain':<15}  way   memory  MACs")
    for r in rows:
        means = (*r["returns"][:2], r["gains"][0])
        cells = [f"{m['mean']:.1f} ± {m['half']:.1f}" for m in means]
        shares = [r.get("way"), r["memory_share"], r["macs_share"]]
        way, memory, macs = ("-" if x is None else f"{100 * x:.0f} %" for x in shares)
        shown = "  ".join(f"{cell:<15}" for cell in cells)
        print(f"{r['rule']:<6}  {r['seed']:<4}  {shown}  {way:<5} {memory:<7} {macs}")
    found = {name: [r for r in rows if r["rule"] == name] for name in RULES}
    summary = [{"rule": name, **summed(of)} for name, of in found.items() if of]
    for s in summary:
        print(", ".join(f"{k} {v}" for k, v in s.items()))
    if args.json:
        task = f"--task {args.task} " if args.verb == "cheetah" else ""
        made = {
            "command": f"python benchmarks/rl.py {args.verb} {task}--seeds {args.seeds} "
            f"--json {args.json.name}",
            "python": platform.python_version(), "torch": torch.__version__,
            "cores": os.cpu_count(), "environment": environment.name, "rows": rows,
            "summary": summary,
        }  # fmt: skip
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with half of their 95 % intervals."""
    parts = {f"after {k}": [r["returns"][k]["mean"] for r in rows] for k in range(4)}
    parts["gain"] = [r["gains"][0]["mean"] for r in rows]
    if "way" in rows[0]:
        parts["way, %"] = [100 * r["way"] for r in rows]
    shares = {k: rows[0][k] for k in ("memory_share", "macs_share")}
    return {"seeds": len(rows), **{k: str(mean(v)) for k, v in parts.items()}, **shares}


if __name__ == "__main__":
    main()
