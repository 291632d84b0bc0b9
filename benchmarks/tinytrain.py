"""TinyTrain and its baselines on few-shot tasks of other domains, with and without meta-training.

    python benchmarks/tinytrain.py metatrain --net mcunet-5fps
    python benchmarks/tinytrain.py keep        # the best epoch so far of one that was stopped
    python benchmarks/tinytrain.py compare --net mcunet-5fps --tasks 30 --json FILE
    python benchmarks/tinytrain.py compare --set wide ...
    python benchmarks/tinytrain.py compare --set transductive ...
    python benchmarks/tinytrain.py compare --set ablation ...
    python benchmarks/tinytrain.py selection --json FILE

Backbones with ImageNet weights; meta-training on 130 classes of Tiny-ImageNet (30 others to choose
by); tests on traffic signs, Omniglot, CIFAR-10 and 40 more classes of Tiny-ImageNet: way 5 to 10,
5 shots, 10 queries, 40 iterations of Adam.  Learning rates are chosen for each method, before and
after meta-training, on tasks of validation classes of three of the domains.  Every finished task
is a file below --out (default: ~/.cache/modicum/tinytrain): a rerun does what is missing, and two
processes may share the work (--only traffic_signs,omniglot).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import backbones
import numpy as np
import torch
from lookalikes import grouped

from modicum.arguments import SCHEMES
from modicum.capture import capture
from modicum.fewshot import FineTune, fine_tune, observe_task
from modicum.graph import Graph
from modicum.heads import FewShot, few_shot, with_ways
from modicum.meta import MetaTrain, ProtoNet, metatrain
from modicum.methods import Bias, Full, Last, SparseUpdate, TinyTL, TinyTrain
from modicum.models import MODELS
from modicum.optim import Adam
from modicum.plan import plan
from modicum.task_comparison import (
    Contender,
    Domain,
    TaskComparison,
    compare_on_tasks,
)
from modicum.tasks import (
    Augment,
    FixedEpisodes,
    Labelled,
    Preprocess,
    arrays,
    draw_task,
    load,
)

# the papers' 0.89 and 0.78 MB where their 1 MB would be more than TinyTrain needs there
BUDGET = {"mcunet-5fps": 933_232, "mbv2-w0.35": 1_048_576, "proxyless-w0.3": 817_889}
CACHE = Path.home() / ".cache" / "modicum" / "tinytrain"
observing = importlib.import_module("modicum.observe")  # the name in modicum is the function


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.verb == "metatrain":
        meta_train(args)
    elif args.verb == "keep":
        keep(args)
    elif args.verb == "selection":
        selection(args)
    else:
        compare(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("metatrain", "keep", "compare", "selection"))
    parser.add_argument("--net", choices=backbones.NAMES, default="mcunet-5fps")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--validation-tasks", type=int, default=12, help="that rates are chosen on")
    parser.add_argument("--epochs", type=int, default=30, help="of 100 episodes (metatrain)")
    parser.add_argument("--rate", type=float, default=3e-4, help="(metatrain)")
    parser.add_argument("--set", choices=tuple(SETS), default="main")
    parser.add_argument("--only", default="", help="domains, such as traffic_signs,omniglot")
    parser.add_argument("--meta", type=Path, help="meta-trained weights, those of metatrain else")
    parser.add_argument("--models", default="", help="ImageNet, meta-trained or both")
    parser.add_argument("--methods", default="", help="some of the set's, by label: a;b")
    parser.add_argument("--out", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---- data ---------------------------------------------------------------------------------------


def classes(data: Labelled, low: int, high: int | None) -> Labelled:
    """Some of the classes, in the order of their names."""
    names = sorted(data.classes)[low:high]
    old = [data.classes.index(n) for n in names]
    new = {k: i for i, k in enumerate(old)}
    part = data.subset(np.isin(data.labels, old))
    labels = np.array([new[int(k)] for k in part.labels])
    return replace(part, labels=labels, classes=tuple(names))


def shared(name: str) -> Labelled:
    return load(backbones.SHARED / "data" / name)


def preprocess(net: str, size: int) -> Preprocess:
    normalise = MODELS[net].normalise
    assert normalise is not None
    return Preprocess(size=size, mean=normalise[0], std=normalise[1])


def meta_sets() -> tuple[Labelled, Labelled]:
    tiny = shared("tiny_imagenet.zip")
    return classes(tiny, 0, 130), classes(tiny, 130, 160)


def domains() -> tuple[dict[str, Domain], dict[str, Domain]]:
    """(test, validation): no class is in both.

    Omniglot: the characters of small1 against those alphabets of small2 that are not in small1.
    Traffic signs twice: as they are, where frames of one sign may lie on both sides of a task,
    and with pictures that look alike on one side: see lookalikes.py.
    """
    traffic = shared("traffic_signs.zip")
    first, second = (
        load(backbones.SHARED / "data" / f"omniglot_small{k}.zip", class_level=2) for k in (1, 2)
    )
    known = {c.partition("/")[0] for c in first.classes}
    others = [c for c in second.classes if c.partition("/")[0] not in known]
    tiny = shared("tiny_imagenet.zip")
    test = {
        "traffic_signs": Domain(classes(traffic, 13, None)),
        "traffic_apart": Domain(grouped(classes(traffic, 13, None)), apart=True),
        "omniglot": Domain(first),
        "cifar10": Domain(shared("cifar10_train.zip"), query=shared("cifar10_test.zip")),
        "tiny_imagenet": Domain(classes(tiny, 160, None)),
    }
    validation = {
        "traffic_signs": Domain(classes(traffic, 0, 13)),
        "omniglot": Domain(named(second, others)),
        "tiny_imagenet": Domain(classes(tiny, 130, 160)),
    }
    return test, validation


def named(data: Labelled, names: list[str]) -> Labelled:
    keep = [i for i, name in enumerate(sorted(data.classes)) if name in names]
    parts = [classes(data, i, i + 1) for i in keep]
    index = np.concatenate([p.index for p in parts])
    labels = np.concatenate([np.full(len(p), k) for k, p in enumerate(parts)])
    chosen = tuple(sorted(data.classes)[i] for i in keep)
    return replace(parts[0], index=index, labels=labels, classes=chosen)


# ---- methods ------------------------------------------------------------------------------------


def main_set(net: str) -> dict[str, Contender]:
    """The rows of the papers' tables; `batch` is what their memory is counted for."""
    ours = TinyTrain(ram=BUDGET[net])
    return {
        "none": Contender(),
        "last": Contender(method=Last(), rates=(1e-3, 3e-3, 1e-2)),
        "full": Contender(method=Full(), rates=(1e-4, 3e-4, 1e-3), batch=100),
        "sparse_update": Contender(
            method=SparseUpdate(scheme=SCHEMES[net]), rates=(3e-4, 1e-3, 3e-3)
        ),
        "tinytrain": Contender(method=ours, rates=(1e-3, 3e-3, 1e-2)),
        "tinytrain-50": Contender(
            method=ours.model_copy(update={"channel_ratio": 0.5}), rates=(1e-3, 3e-3, 1e-2)
        ),
        "tinytrain-50, 25 % of MACs": Contender(
            method=ours.model_copy(update={"channel_ratio": 0.5, "macs_fraction": 0.25}),
            rates=(1e-3, 3e-3, 1e-2),
        ),
    }


def wide_set(net: str) -> dict[str, Contender]:
    """The other baselines, beside those rows of the main set that they are read against."""
    main = main_set(net)
    rates = (3e-4, 1e-3, 3e-3)
    adapters = {
        f"adapterdrop-{round(100 * d)}": Contender(method=TinyTL(drop=d), rates=rates, batch=100)
        for d in (0.25, 0.5, 0.75)
    }
    return {
        **{label: main[label] for label in ("none", "last", "tinytrain")},
        "bias": Contender(method=Bias(head=0), rates=(1e-3, 3e-3, 1e-2)),
        "tinytl": Contender(method=TinyTL(), rates=rates, batch=100),
        **adapters,
    }


def transductive_set(net: str) -> dict[str, Contender]:
    """A full update that sees the queries too, three times as slow as one that does not, beside
    rows of the main set with the rates that were chosen there for both starts.  Its own are the two
    that were chosen for the full update, before and after meta-training."""
    main = main_set(net)
    last = main["last"].model_copy(update={"rates": (1e-2,)})
    ours = main["tinytrain"].model_copy(update={"rates": (3e-3,)})
    seeing = main["full"].model_copy(update={"rates": (1e-4, 3e-4), "tune": FineTune(entropy=1.0)})
    return {"none": main["none"], "last": last, "tinytrain": ours, "transductive": seeing}


def equal_set(net: str) -> dict[str, Contender]:
    """Why SparseUpdate is ahead of TinyTrain at 128x128: of mcunet-5fps it takes 1.5 MiB and 29 %
    of the MACs, trains biases, and reaches into the eighth block from the end."""
    main = main_set(net)
    more = TinyTrain(ram=3 << 19, macs_fraction=0.29)
    rates = main["tinytrain"].rates
    return {
        "sparse_update": main["sparse_update"],
        "tinytrain": main["tinytrain"],
        "tinytrain, as much": Contender(method=more, rates=rates),
        "tinytrain-50, as much": Contender(
            method=more.model_copy(update={"channel_ratio": 0.5}), rates=rates
        ),
        "tinytrain-50 with biases, as much": Contender(
            method=more.model_copy(update={"channel_ratio": 0.5, "bias": True}), rates=(3e-3,)
        ),
        "tinytrain-50 in 8 blocks, as much": Contender(
            method=more.model_copy(update={"channel_ratio": 0.5, "inspect_blocks": 8}),
            rates=(3e-3,),
        ),
        "tinytrain-50 in 8 blocks, 25 % of MACs": Contender(
            method=TinyTrain(
                ram=BUDGET[net], macs_fraction=0.25, channel_ratio=0.5, inspect_blocks=8
            ),
            rates=(3e-3,),
        ),
    }


def ablation_set(net: str) -> dict[str, Contender]:
    """Papers' table 3 and figure 6b: how layers are chosen, and how channels.

    All with the rate that validation chose for the full criterion.
    """
    rates = (3e-3,)
    base = TinyTrain(ram=BUDGET[net])
    criteria = ("fisher", "fisher/memory", "fisher/compute", "l2", "random")
    made = {"full criterion": base} | {
        f"layers by {c}": base.model_copy(update={"criterion": c}) for c in criteria
    }
    made |= {f"channels by {c}": base.model_copy(update={"channels": c}) for c in ("l2", "random")}
    made |= {
        "with biases": base.model_copy(update={"bias": True}),
        "fill": base.model_copy(update={"fill": True}),
        "input channels": base.model_copy(update={"axis": "in"}),
    }
    return {label: Contender(method=m, rates=rates) for label, m in made.items()}


RULE = FixedEpisodes(ways=(5, 10), shots=5, queries=10)
FAR = ("traffic_signs", "omniglot")
SETS = {
    "main": main_set,
    "wide": wide_set,
    "transductive": transductive_set,
    "equal": equal_set,
    "ablation": ablation_set,
}


# ---- verbs --------------------------------------------------------------------------------------


def meta_train(args: argparse.Namespace) -> None:
    train, held = meta_sets()
    net = few_shot(backbones.load(args.net, classes=None), 5)
    config = MetaTrain(
        epochs=args.epochs, episodes=100, rate=args.rate, warmup=1,
        warmup_rate=args.rate / 50, final_rate=args.rate / 50, validation=60,
        augment=Augment(crop="resized", scale=(0.5, 1.0)),
    )  # fmt: skip
    trace = metatrain(
        net, train, preprocess(args.net, args.size), config, out=folder(args) / "meta",
        validation=held, progress=True,
    )  # fmt: skip
    show(args, {"trace": trace.model_dump(), "config": config.model_dump(mode="json")})


def keep(args: argparse.Namespace) -> None:
    """weights.pt of a training that was stopped: those of its best epoch on validation tasks."""
    meta = folder(args) / "meta"
    net = few_shot(backbones.load(args.net, classes=None), 5)
    learner = ProtoNet().learner(net)
    learner.load_state_dict(torch.load(meta / "checkpoint.pt", weights_only=True)["best"])
    learner.write_to(net)
    torch.save(net.state_dict(), meta / "weights.pt")


def meta_log(args: argparse.Namespace) -> list[dict[str, float]]:
    """What meta-training said of each epoch that it has done."""
    path = meta_weights(args).parent / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def meta_weights(args: argparse.Namespace) -> Path:
    return args.meta or folder(args) / "meta" / "weights.pt"


def models(args: argparse.Namespace) -> dict[str, FewShot]:
    made = {"ImageNet": few_shot(backbones.load(args.net, classes=None), 5)}
    weights = meta_weights(args)
    if weights.exists():
        net = few_shot(backbones.load(args.net, classes=None), 5)
        net.load_state_dict(torch.load(weights, weights_only=True))
        made["meta-trained"] = net
    else:
        print(f"no {weights}: run metatrain first for the other half", file=sys.stderr)
    return {k: v for k, v in made.items() if not args.models or k in args.models.split(",")}


def folder(args: argparse.Namespace) -> Path:
    return args.out / f"{args.net}-{args.size}"


def compare(args: argparse.Namespace) -> None:
    test, validation = domains()
    test = {k: v for k, v in test.items() if not args.only or k in args.only.split(",")}
    contenders = SETS[args.set](args.net)
    if args.methods:
        contenders = {k: v for k, v in contenders.items() if k in args.methods.split(";")}
    made = compare_on_tasks(
        models(args), contenders, test, preprocess(args.net, args.size), out=folder(args),
        tasks=args.tasks, rule=RULE,
        validation=validation, validation_tasks=args.validation_tasks, progress=True,
    )  # fmt: skip
    print(made)
    reference = "full criterion" if args.set == "ablation" else "tinytrain"
    far = [d for d in FAR if d in made.domains] or list(made.domains)
    show(args, {
        "tasks": args.tasks, "size": args.size, "validation_tasks": args.validation_tasks,
        "meta_training": meta_log(args), "rows": table(made, reference),
        "pairs_far": pairs(made, far), "pairs_all": pairs(made, list(made.domains)),
    })  # fmt: skip


def pairs(made: TaskComparison, among: list[str]) -> list[dict[str, str]]:
    """How much more accurate each of our methods is than each other one, task by task, in points
    with half of the 95 % interval; a column for each start."""
    known = {row.key: row for row in made.rows}
    labels = list(dict.fromkeys(row.label for row in made.rows))
    ours = [k for k in labels if k.startswith("tinytrain") or k == "full criterion"]
    found = []
    for label in ours:
        for other in (k for k in labels if k not in ours):
            points = {
                model: made.difference(known[model, label], known[model, other], among).signed
                for model in dict.fromkeys(row.model for row in made.rows)
                if (model, label) in known and (model, other) in known
            }
            found.append({"method": label, "less": other, **points})
    return found


def selection(args: argparse.Namespace) -> None:
    """What selecting takes beside fine-tuning, task by task, in seconds of this process's CPU
    time, which other processes hardly change.

    `first_share` is that of the first task of each number of ways, for which the pass that scores
    is planned.  Python's collector looks through what was loaded before once, not in some task of
    thirty, where its 0.2 s are a tenth of the fine-tuning.
    """
    test, _ = domains()
    methods = {k: c.method for k, c in main_set(args.net).items()}
    net = list(models(args).values())[-1].eval()
    graph = capture(net, torch.zeros(1, *preprocess(args.net, args.size).shape))
    drawn = [
        (i, arrays(task.support, preprocess(args.net, args.size)))
        for domain in FAR
        for i in range(args.tasks)
        for task in [draw_task(test[domain].dataset, RULE, seed=0, index=i)]
    ]
    ways = [int(support[1].max()) + 1 for _, support in drawn]
    gc.collect()
    gc.freeze()
    rows = []
    for label, method in methods.items():
        if not isinstance(method, TinyTrain):
            continue
        observing._inspections.clear()  # each method pays for its own
        seconds = [selected(net, graph, method, support, seed=i) for i, support in drawn]
        selecting, learning = np.array(seconds).T
        first = [ways.index(n) for n in sorted(set(ways))]
        rows.append({
            "method": label, "tasks": len(seconds), "selection_s": float(selecting.mean()),
            "learning_s": float(learning.mean()),
            "share": float(selecting.sum() / learning.sum()),
            "median_share": float(np.median(selecting / learning)),
            "first_share": float(selecting[first].sum() / learning[first].sum()),
        })  # fmt: skip
        print("{method:28} selects in {selection_s:.3f} s, learns in {learning_s:.2f} s: "
              "{share:.1%}, median {median_share:.1%}, first tasks {first_share:.1%}"
              .format(**rows[-1]))  # fmt: skip
    show(args, {"clock": "CPU time of the process", "rows": rows})


def selected(
    model: FewShot,
    graph: Graph,
    method: TinyTrain,
    support: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> tuple[float, float]:
    """(seconds of selecting, seconds of learning) of a task, as `compare_on_tasks` does both."""
    ways = int(support[1].max()) + 1
    net, own = model.of_ways(ways), with_ways(graph, ways)
    began = time.process_time()
    seen = observe_task(net, own, method, support, FineTune(), seed=seed)
    made = plan(own, None, method, Adam(lr=3e-3), samples=seen)
    between = time.process_time()
    fine_tune(net, made, support, FineTune(), seed=seed)
    return between - began, time.process_time() - between


def table(made: TaskComparison, reference: str) -> list[dict[str, object]]:
    """A row per method: accuracy by domain, and how much more accurate `reference` is on the far
    domains and on all, task by task, in points with half of the 95 % interval."""
    far = [d for d in FAR if d in made.domains]
    rows = []
    for row in made.rows:
        known = [r for r in made.rows if r.key == (row.model, reference)]
        ahead = {}
        if known and row.label != reference:
            ahead["ahead_all"] = made.difference(known[0], row).signed
            if far:
                ahead["ahead_far"] = made.difference(known[0], row, far).signed
        rows.append({
            "model": row.model, "method": row.label,
            **{d: str(made.accuracy(row, [d])) for d in made.domains},
            "far": str(made.accuracy(row, far)) if far else None, "all": str(made.accuracy(row)),
            **ahead,
            "rate": row.rate, "tried": row.tried, "trained": row.trained,
            "memory_mb": row.memory / 2**20, "memory_one_mb": row.memory_one / 2**20,
            "saved_kb": row.saved / 1024, "dynamic_kb": row.dynamic / 1024,
            "ram_kb": row.ram / 1024, "macs": row.macs,
            "selection_s": row.selection, "learning_s": row.seconds,
            "selection_share": row.selection / row.seconds if row.seconds else None,
            "failed": row.failed, "accuracies": row.accuracies,
        })  # fmt: skip
    return rows


def show(args: argparse.Namespace, result: dict[str, object]) -> None:
    if args.json:
        given = {k: getattr(args, k) for k in ("net", "size", "tasks", "validation_tasks", "set",
                                               "only", "models", "methods")}  # fmt: skip
        flags = [f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in given.items() if v]
        if args.meta:
            flags.append(f"--meta {str(args.meta).replace(str(Path.home()), '~')}")
        flags = [] if args.verb == "metatrain" else flags
        words = ["python benchmarks/tinytrain.py", args.verb, *flags, "--json", args.json.name]
        command = " ".join(words)
        made = {
            "command": command, "python": platform.python_version(), "torch": torch.__version__,
            "cores": os.cpu_count(), **result,
        }  # fmt: skip
        args.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
