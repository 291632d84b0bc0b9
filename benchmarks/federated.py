"""Federated meta-learning: quality of new clients against rounds, bytes and modelled energy.

    python benchmarks/federated.py study --case sines --seeds 5
    python benchmarks/federated.py table --case sines --json FILE --picture FILE.svg
    python benchmarks/federated.py clients --json FILE      # in C, two on emulated boards
    python benchmarks/federated.py faults --json FILE       # failures, lies, kills

Three use cases: sine waves (a wave for each client), characters (an alphabet and quarter turn for
each), spoken digits (four speakers; two others are the new clients).  Clients train in the emitted
C, on one core.  16 times in a run new clients learn from a few samples and are tested.
Rates and what is local were chosen by hand on seed 0, which is not in the tables (--first 1).
Every finished run is a file below --out (default: ~/.cache/modicum/federated); a rerun does what is
missing, and two processes may share the work by --case or --only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backbones
import numpy as np
import torch
from torch import nn

from modicum.board import get as board
from modicum.emit import emit
from modicum.federated.board import BoardLearner, Emulated
from modicum.federated.cases import CASES
from modicum.federated.client_app import Site, client_app
from modicum.federated.energy import Energy
from modicum.federated.faults import FaultyGrid
from modicum.federated.federation import History, client_plans, federate, make_learner, shots_in_all
from modicum.federated.flower import quiet
from modicum.federated.grid import LocalGrid
from modicum.federated.learner import NativeLearner
from modicum.federated.populations import Population, SineClients
from modicum.federated.rules import (
    FedAvg,
    FederatedRule,
    FedRecon,
    Outer,
    Reptile,
    TinyMetaFed,
    TinyReptile,
)
from modicum.federated.server import Server
from modicum.federated.strategy import Federate, read_history, run_rounds
from modicum.federated.torch_learner import TorchLearner
from modicum.report.comparison import interval
from modicum.report.federation import Points, save_curves
from modicum.run import run as run_on

CACHE = Path.home() / ".cache" / "modicum" / "federated"
PATHS = {
    "sines": (),
    "characters": ("omniglot_small1.zip", "omniglot_small2.zip"),
    "words": ("spoken_digits.npz",),
}
BOARD = "nano33ble"
BATCH = 4
JUDGED = 16
OTHERS = ("no reconstruction", "no Top-P", "batches", "no annealing")


@dataclass(frozen=True)
class Setting:
    """A use case, for how long, and how new clients are judged.  `rules` by label.

    TinyMetaFed and its variants, whose rounds cost a fraction of the others' bytes, have `longer`
    times as many of them: bytes are what is compared, and the energy of more rounds is shown.
    """

    rounds: int
    longer: float
    shots: int
    tests: int
    tasks: int
    population: Callable[[int], Population]
    rules: dict[str, FederatedRule]

    def rounds_of(self, rule: FederatedRule) -> int:
        return round(self.rounds * (self.longer if rule.kind == "tinymetafed" else 1))

    def named(self, only: str) -> dict[str, FederatedRule]:
        wanted = only.split(";") if only else list(self.rules)
        return {k: r for k, r in self.rules.items() if k in wanted}


def rules(
    local: tuple[str, ...], rate: float, rate_local: float, support: int, query: int,
    tune: int, reconstruct: int, top: float, batch_rate: float, recon_rate: float, clients: int,
    start: float,
) -> dict[str, FederatedRule]:  # fmt: skip
    """The methods of a use case: all see `support + query` samples in a client's round.

    Methods in batches take two passes over them, with a rate of their own, and another one where
    they reconstruct.
    """
    samples = support + query
    annealed = Outer(start=start, end=0.0)
    meta = TinyMetaFed(
        local=local, rate=rate, rate_local=rate_local, support=support, query=query, top=top,
        reconstruct=reconstruct, tune=tune, outer=annealed,
    )  # fmt: skip
    whole = {"tune": tune + reconstruct}
    return {
        "FedAvg + fine-tuning": FedAvg(
            rate=batch_rate, query=samples, batch=BATCH, passes=2, clients=clients, **whole
        ),
        "Reptile": Reptile(
            rate=batch_rate, query=samples, batch=BATCH, passes=2, outer=annealed, **whole
        ),
        "TinyReptile": TinyReptile(rate=rate, query=samples, outer=annealed, **whole),
        "FedRecon": FedRecon(
            local=local, rate=recon_rate, rate_local=recon_rate, support=support, query=query,
            batch=BATCH, passes=2, clients=clients, reconstruct=reconstruct, tune=tune,
        ),
        "TinyMetaFed": meta,
        "no reconstruction": meta.model_copy(
            update={"local": (), "support": 0, "query": samples, "reconstruct": 0, **whole}
        ),
        "no Top-P": meta.model_copy(update={"top": 1.0}),
        "batches": meta.model_copy(
            update={"batch": BATCH, "passes": 2, "rate": recon_rate, "rate_local": recon_rate}
        ),
        "no annealing": meta.model_copy(update={"outer": Outer(start=start / 2, end=start / 2)}),
        "8 bits, feedback (ours)": meta.model_copy(update={"values": "int8", "feedback": True}),
    }  # fmt: skip


def shared(case: str, seed: int) -> Population:
    paths = [backbones.SHARED / "data" / name for name in PATHS[case]]
    return CASES[case].population(paths, seed)


SETTINGS: dict[str, Setting] = {
    "sines": Setting(
        800, 3.5, 10, 50, 1, lambda seed: SineClients(50, 40, seed),
        rules(
            local=("layers.4.bias",), rate=0.005, rate_local=0.005, support=4, query=44, tune=7,
            reconstruct=1, top=0.05, batch_rate=0.02, recon_rate=0.01, clients=5, start=1.0,
        ),
    ),
    "characters": Setting(
        240, 2.5, 5, 50, 4, lambda seed: shared("characters", seed),
        rules(
            local=("head.*",), rate=0.02, rate_local=0.02, support=20, query=40, tune=3,
            reconstruct=1, top=0.1, batch_rate=0.05, recon_rate=0.05, clients=4, start=0.5,
        ),
    ),
    "words": Setting(
        300, 2.5, 5, 50, 2, lambda seed: shared("words", seed),
        rules(
            local=("*.bias",), rate=0.02, rate_local=0.01, support=16, query=32, tune=3,
            reconstruct=1, top=0.2, batch_rate=0.05, recon_rate=0.05, clients=4, start=1.0,
        ),
    ),
}  # fmt: skip


# ---- study --------------------------------------------------------------------------------------


def study(args: argparse.Namespace) -> None:
    setting = SETTINGS[args.case]
    for seed in range(args.first, args.first + args.seeds):
        for label, rule in setting.named(args.only).items():
            path = record(args, args.case, label, seed)
            if path.exists() and is_of(json.loads(path.read_text()), setting, rule):
                continue
            start = time.perf_counter()
            made = federated(args, setting, rule, seed)
            seconds = time.perf_counter() - start
            if made is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = summary(made) | {"label": label, "seconds": seconds, "case": args.case}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(kept) + "\n")
            part.replace(path)
            q = [round(j["after"], 3) for j in kept["judgements"]]
            print(f"{args.case} {seed} {label:24} {q[0]} -> {q[len(q) // 2]} -> {q[-1]}  "
                  f"{made.bytes / 1e6:.2f} MB  {seconds:.0f} s", flush=True)  # fmt: skip


def federated(
    args: argparse.Namespace, setting: Setting, rule: FederatedRule, seed: int
) -> History:
    return federate(
        network(args.case, seed), example(args.case), rule, setting.population(seed),
        rounds=setting.rounds_of(rule), board=BOARD, shots=setting.shots, tests=setting.tests,
        tasks=setting.tasks, judge_every=setting.rounds_of(rule) // JUDGED, seed=seed,
        workspace=args.out / "emitted",
    )  # fmt: skip


def network(case: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CASES[case].model().eval()


def example(case: str) -> torch.Tensor:
    return torch.zeros(1, *CASES[case].input)


def summary(made: History) -> dict[str, Any]:
    """What the tables need: bytes by round, not each round's log."""
    spent, total = [], 0
    for r in made.rounds:
        total += r.bytes_down + r.bytes_up
        spent.append(total)
    return {
        "rule": made.rule, "seed": made.seed, "ram": made.ram, "shared": made.shared,
        "local": made.local, "loss": made.loss,
        "judgements": [
            {"round": j.round, "before": j.before, "after": j.after,
             "bytes": spent[j.round - 1] if j.round else 0}
            for j in made.judgements
        ],
        "down": sum(r.bytes_down for r in made.rounds),
        "up": sum(r.bytes_up for r in made.rounds),
        "asked": sum(len(r.asked) for r in made.rounds),
        "failed": sum(len(r.failed) for r in made.rounds),
    }  # fmt: skip


def record(args: argparse.Namespace, case: str, label: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in label).strip("-")
    return args.out / case / f"{name}-{seed}.json"


# ---- table --------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    """A row for each method of a use case, and pictures beside --picture."""
    setting = SETTINGS[args.case]
    found = {label: records(args, args.case, label) for label in setting.rules}
    found = {label: runs for label, runs in found.items() if runs}
    energy = {label: joules(args, args.case, setting.rules[label]) for label in found}
    rows = [row(label, runs, found, energy[label]) for label, runs in found.items()]
    targets = [tail(r)[0] for r in found["TinyReptile"]]
    made = {
        "command": f"python benchmarks/federated.py table --case {args.case} "
        f"--json {args.json.name}",
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
        "rounds": setting.rounds, "shots": setting.shots, "target": str(Mean(targets)),
        "rows": rows,
    }  # fmt: skip
    args.json.write_text(json.dumps(made, indent=1) + "\n")
    for r in rows:
        print("  ".join(f"{k} {v}" for k, v in r.items() if not isinstance(v, list)))
    if args.picture:
        whole = {k: [r for r in runs if complete(r)] for k, runs in found.items()}
        curves = {k: points_of(runs, energy[k]) for k, runs in whole.items() if runs}
        main_ = {k: v for k, v in curves.items() if k not in OTHERS}
        parts = {k: v for k, v in curves.items() if k in ("TinyMetaFed", *OTHERS)}
        name = "mean squared error" if CASES[args.case].loss == "mse" else "accuracy"
        title = f"{args.case}: new clients after {setting.shots} shots, {len(targets)} seeds"
        save_curves(args.picture, main_, name, title)
        other = args.picture.with_name(f"{args.picture.stem}_parts{args.picture.suffix}")
        save_curves(other, parts, name, title)


def records(args: argparse.Namespace, case: str, label: str) -> list[dict[str, Any]]:
    """Of the rule as it is now; seed 0, which it was chosen on, is left out."""
    paths = [record(args, case, label, seed) for seed in range(1, 100)]
    found = [json.loads(p.read_text()) for p in paths if p.exists()]
    return [r for r in found if is_of(r, SETTINGS[case], SETTINGS[case].rules[label])]


def is_of(run: dict[str, Any], setting: Setting, rule: FederatedRule) -> bool:
    same = run["rule"] == rule.model_dump(mode="json")
    return same and run["asked"] == setting.rounds_of(rule) * rule.clients


def row(
    label: str, runs: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]],
    energy: tuple[float, Energy],
) -> dict[str, Any]:  # fmt: skip
    """The quality over the last quarter of the judged rounds and its deviation there, and bytes to
    TinyReptile's.

    The target of a seed is TinyReptile's mean over its last quarter.  It is reached with the last
    of three judged rounds whose mean is as good.  `ratio` is of the bytes to it to TinyReptile's
    own bytes to it, `of_fedavg` of FedAvg's to these; over the seeds that reached it.  A run whose
    judgements end early has diverged: it reaches nothing, and has no quality.
    """
    targets = {r["seed"]: tail(r)[0] for r in found["TinyReptile"]}
    to, tiny, average = (
        {r["seed"]: reached(r, targets[r["seed"]]) for r in of}
        for of in (runs, found["TinyReptile"], found.get("FedAvg + fine-tuning", []))
    )
    got = {seed: b for seed, b in to.items() if b is not None}
    each, model = energy
    whole = [r for r in runs if complete(r)]
    total = [r["down"] + r["up"] for r in runs]
    ratio = [b / t for s, b in got.items() if (t := tiny[s]) is not None]
    fewer = [a / b for s, b in got.items() if (a := average.get(s)) is not None]
    return {
        "method": label, "seeds": len(runs), "rounds": runs[0]["judgements"][-1]["round"],
        "shared": runs[0]["shared"], "local": runs[0]["local"], "ram": runs[0]["ram"],
        "diverged": len(runs) - len(whole),
        "quality": str(Mean([tail(r)[0] for r in whole])),
        "deviation": str(Mean([tail(r)[1] for r in whole])),
        "megabytes": str(Mean([b / 1e6 for b in total], 2)),
        "up_share": sum(r["up"] for r in runs) / sum(total),
        "joules": str(Mean([r["asked"] * each + model.radio(b)
                            for r, b in zip(runs, total, strict=True)], 2)),
        "reached": f"{len(got)} of {len(to)}",
        "to_target": str(Mean([b / 1e6 for b in got.values()], 2)) if got else None,
        "ratio": str(Mean(ratio, 2)) if ratio else None,
        "of_fedavg": str(Mean(fewer, 1)) if fewer else None,
        "qualities": [tail(r)[0] for r in runs], "deviations": [tail(r)[1] for r in runs],
        "bytes_to_target": list(to.values()), "failed": sum(r["failed"] for r in runs),
        "seconds": statistics.fmean(r["seconds"] for r in runs),
    }  # fmt: skip


def complete(run: dict[str, Any]) -> bool:
    return len(run["judgements"]) > JUDGED


@dataclass(frozen=True)
class Mean:
    """A mean and half of its 95 % interval, as text."""

    values: list[float]
    digits: int = 3

    def __str__(self) -> str:
        half = interval(self.values)
        text = f"{statistics.fmean(self.values):.{self.digits}f}"
        return text if half is None else f"{text} ± {half:.{self.digits}f}"


def tail(run: dict[str, Any]) -> tuple[float, float]:
    """(mean, standard deviation) of the quality over the last quarter of the judged rounds."""
    late = [j["after"] for j in run["judgements"]][-(JUDGED // 4) :]
    return statistics.fmean(late), statistics.pstdev(late)


def reached(run: dict[str, Any], target: float) -> int | None:
    judged = run["judgements"]
    better = (lambda q: q <= target) if run["loss"] == "mse" else (lambda q: q >= target)
    for i in range(3, len(judged)):
        if complete(run) and better(statistics.fmean(j["after"] for j in judged[i - 2 : i + 1])):
            return int(judged[i]["bytes"])
    return None


def points_of(runs: list[dict[str, Any]], energy: tuple[float, Energy]) -> list[Points]:
    """Of every run: (round, bytes, joules, quality)."""
    each, model = energy
    made = []
    for r in runs:
        clients = r["asked"] / r["judgements"][-1]["round"]
        made.append([
            (j["round"], j["bytes"], j["round"] * clients * each + model.radio(j["bytes"]),
             j["after"])
            for j in r["judgements"]
        ])  # fmt: skip
    return made


def joules(args: argparse.Namespace, case: str, rule: FederatedRule) -> tuple[float, Energy]:
    """What a client's round takes to compute, by executed instructions of an emulated M4F."""
    setting = SETTINGS[case]
    plan = client_plans(
        network(case, 0), example(case), rule, CASES[case].loss,
        shots_in_all(setting.population(0), setting.shots), BOARD,
    )[0]  # fmt: skip
    path = args.out / case / f"instructions-{plan.hash[:16]}-{rule.passes}.json"
    model = Energy.of(board(BOARD))
    if not path.exists():
        learner: Any = make_learner(network(case, 0), plan, rule, "native", args.out / "emitted")
        del learner
        folder = next((args.out / "emitted").glob("c-*"))
        for folder in (args.out / "emitted").glob("c-*"):
            if json.loads((folder / "plan.json").read_text())["hash"] == plan.hash:
                break
        population = setting.population(0)
        rng = np.random.default_rng(0)
        sides = population.streams(0, rule.support, rule.query, rng)
        first, second = (list(side) for side in sides)
        order = list(range(len(first)))
        order += [len(first) + i for _ in range(rule.passes) for i in range(len(second))]
        x, y = (np.stack([s[k] for s in first + second]) for k in (0, 1))
        trace = run_on(folder, "m4f", train=(x, y), order=order)
        path.write_text(json.dumps({"instructions": trace.figures["instructions_train_all"],
                                    "ram": trace.figures["ram"]}) + "\n")  # fmt: skip
    found = json.loads(path.read_text())
    return model.compute(found["instructions"]), model


# ---- clients in C, on boards and in PyTorch -----------------------------------------------------


def clients(args: argparse.Namespace) -> None:
    """20 rounds of sines: four clients in the shared library, two on emulated Cortex-M4F; the same
    with all of them in PyTorch."""
    quiet()
    rule = SETTINGS["sines"].rules["TinyMetaFed"].model_copy(update={"clients": 6})
    setting = SETTINGS["sines"]
    population = SineClients(6, 2, 0)
    net = network("sines", 0)
    plan, deploy = client_plans(net, example("sines"), rule, "mse", setting.shots, BOARD)
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folders = [emit(net, plan, Path(place) / f"client-{k}") for k in range(6)]
        boards = [stack.enter_context(Emulated(f, "m4f", rule.local)) for f in folders[4:]]
        mixed = [NativeLearner(f, rule.local) for f in folders[:4]]
        mixed += [BoardLearner(b.link, f, rule.local)
                  for b, f in zip(boards, folders[4:], strict=True)]  # fmt: skip
        in_torch = [TorchLearner(net, plan, rule.local) for _ in range(6)]
        for name, learners in (("C and boards", mixed), ("PyTorch", in_torch)):
            start = time.perf_counter()
            settles = TorchLearner(net, deploy, rule.local)
            made[name] = rounds_of(rule, population, learners, settles)
            made[name]["seconds"] = time.perf_counter() - start
        figures = [learner.figures() for learner in mixed[4:]]
    a, b = (np.array([r["loss"] for r in made[n]["rounds"]]) for n in made)
    result = {
        "command": f"python benchmarks/federated.py clients --json {args.json.name}",
        "rounds": len(a), "clients": 6, "largest_difference": float(np.abs(a - b).max()),
        "bytes_alike": made["PyTorch"]["bytes"] == made["C and boards"]["bytes"],
        "ram": [f.ram for f in figures], "ram_limit": board(BOARD).ram,
        "instructions_a_sample": [f.learn for f in figures],
        "losses": {"C and boards": a.tolist(), "PyTorch": b.tolist()},
        "judged": {n: made[n]["judged"] for n in made},
        "seconds": {n: made[n]["seconds"] for n in made},
    }  # fmt: skip
    print(f"{len(a)} rounds, losses apart by {result['largest_difference']:.2e} at most; "
          f"RAM of the firmware {result['ram']} of {result['ram_limit']:,} bytes")  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def rounds_of(
    rule: FederatedRule, population: Population, learners: list[Any], deployment: Any
) -> dict[str, Any]:
    """20 rounds in which each client trains with a learner of its own."""
    apps = [
        client_app(lambda context, of=of: Site(rule, population, of, deployment, 10, 50, 1, 0))
        for of in learners
    ]
    apps += apps[:1] * population.newcomers

    def dispatch(message: Any, context: Any) -> Any:
        return apps[context.node_config["partition-id"]](message, context)

    grid = LocalGrid(dispatch, len(apps))  # type: ignore[arg-type]
    layout = learners[0].layout
    server = Server(rule, layout.model, deployment.shared(), 20, 0)
    strategy = Federate(server, population.clients, judge_every=20)
    run_rounds(strategy, grid)
    return {
        "rounds": [r.as_dict() for r in strategy.rounds],
        "judged": [j.after for j in strategy.judgements],
        "bytes": sum(r.bytes_down + r.bytes_up for r in strategy.rounds),
    }


# ---- faults -------------------------------------------------------------------------------------


def faults(args: argparse.Namespace) -> None:
    """Characters: 30 % of the answers lost, a liar in every round, the server killed twice.

    Reptile with six clients a round, in mini-batches, annealed.

    Against the same without faults, over seeds.
    """
    rows = []
    for seed in range(args.first, args.first + args.seeds):
        clean = hurt_run(args, seed, share=0.0, liar=False, kills=0)
        hurt = hurt_run(args, seed, share=0.3, liar=True, kills=2)
        rows.append({"seed": seed, "clean": clean, "faults": hurt})
        print(f"seed {seed}: {clean['after']:.3f} without faults, {hurt['after']:.3f} with "
              f"{hurt['failed']} answers not used, {hurt['kills']} kills")  # fmt: skip
    ends = {k: [r[k]["after"] for r in rows] for k in ("clean", "faults")}
    result = {
        "command": f"python benchmarks/federated.py faults --seeds {args.seeds} "
        f"--json {args.json.name}",
        "rows": rows, **{k: str(Mean(v)) for k, v in ends.items()},
        "difference": str(Mean([b - a for a, b in zip(*ends.values(), strict=True)])),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1) + "\n")


FAULTY_ROUNDS = 150


def hurt_run(
    args: argparse.Namespace, seed: int, share: float, liar: bool, kills: int
) -> dict[str, Any]:
    """In a process of its own, which is killed and started again in the same folder."""
    with tempfile.TemporaryDirectory() as place:
        what = json.dumps({"seed": seed, "share": share, "liar": liar, "folder": place})
        command = [sys.executable, __file__, "faulty", "--out", str(args.out), "--what", what]
        history = Path(place) / "history.jsonl"
        killed = 0
        while True:
            process = subprocess.Popen(command)
            due = (killed + 1) * FAULTY_ROUNDS // (kills + 1) if killed < kills else None
            while process.poll() is None:
                time.sleep(0.01)
                if due is not None and history.exists() and rounds_in(history) >= due:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    break
            else:
                if process.returncode:
                    raise SystemExit(process.returncode)
                break
        rounds, judged = read_history(Path(place), FAULTY_ROUNDS)
    assert [r.round for r in rounds] == list(range(1, FAULTY_ROUNDS + 1)), "nothing is lost"
    return {
        "after": judged[-1].after, "before": judged[0].after, "kills": killed,
        "failed": sum(len(r.failed) for r in rounds),
        "refused": len({w for r in rounds for w in r.failed.values() if "refused" in w}),
    }  # fmt: skip


def rounds_in(history: Path) -> int:
    return history.read_text().count('"kind": "round"')


def faulty(args: argparse.Namespace) -> None:
    """One run, for `faults`."""
    what = json.loads(args.what)
    setting = SETTINGS["characters"]
    rule = setting.rules["Reptile"].model_copy(update={"clients": 6})
    net, seed = network("characters", what["seed"]), what["seed"]
    population = setting.population(seed)
    few = shots_in_all(population, setting.shots)
    training, deployment = (
        make_learner(net, plan, rule, "native", args.out / "emitted")
        for plan in client_plans(net, example("characters"), rule, "cross_entropy", few, BOARD)
    )
    quiet(logging.ERROR)
    site = Site(rule, population, training, deployment, setting.shots, setting.tests, 12, seed)

    class EveryRound(FaultyGrid):
        """The liar answers in every round, in the place of a client that was asked."""

        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            if messages and messages[0].metadata.message_type == "train" and what["liar"]:
                self.liars = (
                    messages[len(self._answers) % len(messages)].metadata.dst_node_id - 1,
                )
            return super().push_messages(messages)

    nodes = population.clients + population.newcomers
    grid = EveryRound(client_app(lambda context: site), nodes, training.layout,
                      share=what["share"], seed=seed)  # fmt: skip
    server = Server(rule, training.layout.model, training.shared(), FAULTY_ROUNDS, seed)
    strategy = Federate(
        server, population.clients, judge_every=FAULTY_ROUNDS, folder=what["folder"]
    )
    run_rounds(strategy, grid)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=tuple(VERBS))
    parser.add_argument("--case", choices=("", *SETTINGS), default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--only", default="", help="some of the methods, by label: a;b")
    parser.add_argument("--out", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--what", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "study": study, "table": table, "clients": clients, "faults": faults, "faulty": faulty,
}  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    VERBS[args.verb](args)


if __name__ == "__main__":
    main()
