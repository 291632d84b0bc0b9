"""Second-order MAML against `higher` in the same run: tasks per second of one outer gradient.

    python benchmarks/maml_speed.py --json FILE

Conv4 (32 filters, batch statistics), 28x28, 5 ways, 1 shot, 15 queries, 5 inner steps, 4 tasks for
each update.  `higher` (0.2.1; `pip install higher`) is used as its examples do: one task after the
other, gradients added up.  Both get the same tasks and weights, and must come to the same outer
gradient.  Rounds of both alternate; seconds are CPU time of the process, their median is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from modicum.meta import MAML
from modicum.meta.train import keep_freed_memory, tensors
from modicum.models import Conv4

RATE, STEPS, TASKS = 0.1, 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = Conv4()
    drawn = tasks()
    theirs = timed(lambda: peer(net, drawn), args.rounds)
    keep_freed_memory()
    contenders = {"higher, memory kept": lambda: peer(net, drawn)}
    for together in (1, TASKS):
        learner = MAML(rate=RATE, steps=STEPS).learner(net).train()
        label = f"modicum, {together} at once"
        contenders[label] = lambda learner=learner, n=together: ours(learner, drawn, n)
    gradients = {k: f() for k, f in contenders.items()}
    reference = gradients["higher, memory kept"]
    apart = {k: float((g - reference).norm() / reference.norm()) for k, g in gradients.items()}
    took: dict[str, list[float]] = {k: [] for k in contenders}
    for _ in range(args.rounds):
        for label, f in contenders.items():
            took[label] += timed(f, 1)
    seconds = {"higher": theirs} | took
    rows = [
        {
            "what": label, "seconds": float(np.median(s)), "quartiles": quartiles(s),
            "tasks_per_second": TASKS / float(np.median(s)),
            "ratio": float(np.median(theirs) / np.median(s)), "apart": apart.get(label, 0.0),
        }
        for label, s in seconds.items()
    ]  # fmt: skip
    for row in rows:
        print("{what:22} {seconds:.3f} s  {tasks_per_second:5.2f} tasks/s  x {ratio:.2f}  "
              "apart {apart:.1e}".format(**row))  # fmt: skip
    if args.json:
        made = {
            "command": f"python benchmarks/maml_speed.py --rounds {args.rounds} --threads "
            f"{args.threads} --json {args.json.name}",
            "python": platform.python_version(), "torch": torch.__version__, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def tasks() -> tuple[torch.Tensor, ...]:
    """Pictures of noise: what they show does not change how long it takes."""
    rng = np.random.default_rng(0)
    labels = [np.repeat(np.arange(5), n) for n in (1, 15)]
    return tensors(
        [
            tuple(
                a
                for y in labels
                for a in (rng.standard_normal((len(y), 1, 28, 28)).astype(np.float32), y)
            )
            for _ in range(TASKS)
        ],
        torch.device("cpu"),
    )


def peer(net: torch.nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import higher

    net.train()
    net.zero_grad()
    inner = torch.optim.SGD(net.parameters(), RATE)
    for xs, ys, xq, yq in zip(*drawn, strict=True):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (made, steps):
            for _ in range(STEPS):
                steps.step(F.cross_entropy(made(xs), ys))
            (F.cross_entropy(made(xq), yq) / TASKS).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def ours(learner: torch.nn.Module, drawn: tuple[torch.Tensor, ...], n: int) -> torch.Tensor:
    learner.zero_grad()
    for i in range(0, TASKS, n):
        loss, _ = learner(*(part[i : i + n] for part in drawn))
        (loss * (n / TASKS)).backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def timed(f, rounds: int) -> list[float]:
    f()
    took = []
    for _ in range(rounds):
        start = time.process_time()
        f()
        took.append(time.process_time() - start)
    return took


def quartiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.percentile(values, (25, 75))]


if __name__ == "__main__":
    main()
