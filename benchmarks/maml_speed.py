"""Second-order MAML against `higher` in the same run: tasks per second of one outer gradient.

    python benchmarks/maml_speed.py --json FILE

Conv4 (32 filters, batch statistics), 28x28, 5 ways, 1 shot, 15 queries, 5 inner steps, 4 tasks for
each update.  `higher` (0.2.1; `pip install higher`) is used as its examples do: one task after the
other, gradients added up.  Both get the same tasks and weights, and must come to the same outer
gradient, which `apart` compares in float64 (in float32 both lose some digits where the rounding of
a value decides which side of a ReLU it is on).  Rounds alternate, and medians are reported.

One core: seconds are CPU time of the process.  `higher` is measured before and after the memory
allocator is told to keep what is freed, as a meta-training does.

Two cores (`--cores 2`, on a quiet machine): seconds are those of the clock, from the start of an
update to the gradient of all its tasks.  Either one process computes on two threads, or two
processes two tasks each: modicum by DistributedDataParallel, as `torchrun` with metatrain does,
`higher` by an all-reduce of its gradient.  Memory is kept in all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modicum.meta import MAML
from modicum.meta.train import keep_freed_memory, tensors
from modicum.models import Conv4

RATE, STEPS, TASKS = 0.1, 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cores", type=int, choices=(1, 2), default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made: dict[str, Any] = {
        "command": f"python benchmarks/maml_speed.py --rounds {args.rounds} --cores {args.cores}",
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    if args.cores == 2:  # first: the other one has this process keep its memory
        with tempfile.TemporaryDirectory() as folder:
            given = (args.rounds, Path(folder))
            torch.multiprocessing.spawn(two_cores, given, nprocs=2)
            took = json.loads((Path(folder) / "took.json").read_text())
        made["two_cores"] = rows(took, "higher, 2 threads", {})
        show("two cores, seconds of the clock", made["two_cores"])
    made["rows"] = one_core(args.rounds)
    show("one core, seconds of CPU time", made["rows"])
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")


def one_core(rounds: int) -> list[dict[str, Any]]:
    net, drawn = start()
    exact = Conv4().double()
    exact.load_state_dict(net.state_dict())
    precise = tuple(part.double() if part.is_floating_point() else part for part in drawn)
    reference = peer(exact, precise)
    took = {
        "higher": [timed(lambda: peer(net, drawn), time.process_time) for _ in range(rounds + 1)]
    }
    keep_freed_memory()
    contenders: dict[str, Callable[[], Any]] = {"higher, memory kept": lambda: peer(net, drawn)}
    apart = {}
    for together in (1, TASKS):
        label = f"modicum, {together} at once"
        learner = MAML(rate=RATE, steps=STEPS).learner(net).train()
        contenders[label] = lambda learner=learner, n=together: ours(learner, drawn, n)
        found = ours(copy.deepcopy(learner).double(), precise, together)
        apart[label] = float((found - reference).norm() / reference.norm())
    took |= {label: [] for label in contenders}
    for _ in range(rounds + 1):
        for label, f in contenders.items():
            took[label].append(timed(f, time.process_time))
    return rows(took, "higher", apart)


def two_cores(rank: int, rounds: int, folder: Path) -> None:
    """One of two processes; the first one also computes alone, on two threads, and measures."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    keep_freed_memory()
    net, drawn = start()
    share = tuple(part[rank::2] for part in drawn)
    learner = MAML(rate=RATE, steps=STEPS).learner(net).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(learner)

    def peer_in_two() -> None:
        gradient = peer(net, share) / 2
        dist.all_reduce(gradient)

    alone = {
        "higher, 2 threads": lambda: peer(net, drawn),
        "modicum, 2 threads": lambda: ours(learner, drawn, 1),
    }
    both = {
        "higher, 2 processes": peer_in_two,
        "modicum, 2 processes": lambda: ours(wrapped, share, 1),
    }
    took: dict[str, list[float]] = {label: [] for label in (*alone, *both)}
    for _ in range(rounds + 1):
        if rank == 0:
            torch.set_num_threads(2)
            for label, f in alone.items():
                took[label].append(timed(f, time.perf_counter))
            torch.set_num_threads(1)
            time.sleep(0.05)  # until the second thread sleeps
        for label, f in both.items():
            dist.barrier()
            took[label].append(timed(f, time.perf_counter))
    if rank == 0:
        (folder / "took.json").write_text(json.dumps(took))
    dist.destroy_process_group()


def rows(took: dict[str, list[float]], base: str, apart: dict[str, float]) -> list[dict[str, Any]]:
    """Of each contender; its first round, which warms it up, does not count."""
    median = {label: float(np.median(seconds[1:])) for label, seconds in took.items()}
    return [
        {
            "what": label, "seconds": median[label],
            "quartiles": [float(q) for q in np.percentile(seconds[1:], (25, 75))],
            "tasks_per_second": TASKS / median[label], "ratio": median[base] / median[label],
            **({"apart": apart[label]} if label in apart else {}),
        }
        for label, seconds in took.items()
    ]  # fmt: skip


def show(title: str, table: list[dict[str, Any]]) -> None:
    print(title)
    for row in table:
        apart = f"  apart {row['apart']:.0e}" if "apart" in row else ""
        print("  {what:22} {seconds:.3f} s  {tasks_per_second:5.2f} tasks/s  x {ratio:.2f}".format(
            **row) + apart)  # fmt: skip


def start() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Conv4(), tasks()


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
            (F.cross_entropy(made(xq), yq) / len(drawn[0])).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def ours(learner: torch.nn.Module, drawn: tuple[torch.Tensor, ...], n: int) -> torch.Tensor:
    learner.zero_grad()
    count = len(drawn[0])
    for i in range(0, count, n):
        last = i + n == count or not isinstance(learner, torch.nn.parallel.DistributedDataParallel)
        with nullcontext() if last else learner.no_sync():
            loss, _ = learner(*(part[i : i + n] for part in drawn))
            (loss * (n / count)).backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters()])


def timed(f: Callable[[], Any], clock: Callable[[], float]) -> float:
    then = clock()
    f()
    return clock() - then


if __name__ == "__main__":
    main()
