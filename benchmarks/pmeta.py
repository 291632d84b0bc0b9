"""p-Meta and its baselines: accuracy, peak dynamic memory and MACs of an adaptation.

    python benchmarks/pmeta.py train --setting omniglot-5w1s
    python benchmarks/pmeta.py train --setting omniglot-5w1s --set ablation
    python benchmarks/pmeta.py table --json FILE
    python benchmarks/pmeta.py costs --json FILE

Omniglot: 242 characters, 150 to train on (each in four rotations), 42 to validate, 50 to test;
support and query of a test task come from other drawers.  Tiny-ImageNet: 130 / 30 / 40 classes.
Conv4 from scratch, Adam, a cosine schedule, 4 tasks an update; the epoch with the best validation
accuracy is kept and judged on 600 test tasks.  Every finished training is a folder below --out
(default: ~/.cache/modicum/pmeta); one that was stopped goes on, and two processes may take
different --rules.  A table keeps the rows of FILE that --out has no training of, so that machines
may share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import backbones
import numpy as np
import torch
from torch import nn

from modicum.heads import few_shot
from modicum.meta import (
    ANIL,
    BOIL,
    MAML,
    MAMLPP,
    Episodes,
    Learner,
    MetaTrain,
    PMeta,
    ProtoNet,
    Reptile,
    Rule,
    adaptation_cost,
    load_learner,
    metatrain,
)
from modicum.meta.train import TEST_SEED
from modicum.models import Conv4, ResNet12
from modicum.report.rules import AdaptationCost
from modicum.tasks import FixedEpisodes, Labelled, Preprocess, arrays, load

CACHE = Path.home() / ".cache" / "modicum" / "pmeta"


@dataclass(frozen=True)
class Setting:
    """A dataset, a net, and the size of a task."""

    data: str
    ways: int
    shots: int
    queries: int
    net: str
    epochs: int
    episodes: int = 400


SETTINGS = {
    "omniglot-5w1s": Setting("omniglot", 5, 1, 15, "conv4", 10),
    "omniglot-5w5s": Setting("omniglot", 5, 5, 15, "conv4", 6),
    "omniglot-20w1s": Setting("omniglot", 20, 1, 5, "conv4", 10),
    "tiny-5w1s": Setting("tiny", 5, 1, 10, "conv4", 8),
    "tiny-5w5s": Setting("tiny", 5, 5, 10, "conv4", 6),
    "tiny-5w1s-resnet12": Setting("tiny", 5, 1, 5, "resnet12", 6, 200),
}


PMETA = PMeta(rate=0.1, norms="per-step")


def main_set(setting: Setting) -> dict[str, Rule]:
    """The rows of the table: one step size for all, but for ANIL and BOIL, of which a part alone
    moves; MAML++ and p-Meta begin with it and learn theirs, both with norms for each step.

    At 64x64 a head reads 16 times as many features as at 28x28: its steps are smaller.  With 20
    ways p-Meta's are larger; for MAML, BOIL and MAML++ those of 0.3 were tried too, and are worse.
    The limit of p-Meta leaves Conv4 three layers of five at both sizes.
    """
    rate, head = (0.1, 0.5) if grey(setting) else (0.03, 0.03)
    first = 0.3 if setting.ways == 20 else rate
    pmeta = PMETA.model_copy(update={"rate": first, "share": share(setting)})
    return {
        "MAML": MAML(rate=rate),
        "ANIL": ANIL(rate=head),
        "BOIL": BOIL(rate=0.1),
        "MAML++": MAMLPP(rate=rate),
        "p-Meta": pmeta,
        "p-Meta, batch norms": pmeta.model_copy(update={"norms": "batch"}),
        "ProtoNet": ProtoNet(norms="batch"),
        "Reptile": Reptile(rate=rate, passes=2 if setting.ways == 20 else 1),
    }


def share(setting: Setting) -> float:
    return 0.3 if grey(setting) else 0.2


def frozen_set() -> dict[str, Rule]:
    """With running statistics, as on a device that sees one sample at a time."""
    return {
        "MAML, frozen norms": MAML(rate=0.1, norms="frozen"),
        "p-Meta, frozen norms": PMeta(rate=0.1, norms="frozen"),
    }


def ablation_set() -> dict[str, Rule]:
    base = PMETA
    made = {
        "layers and channels": base,  # p-Meta, in as many updates as the others of this set
        "layers only": base.model_copy(update={"channels": "none"}),
        "channels only, both": base.model_copy(update={"share": 1.0}),
        "channels only, fw": base.model_copy(update={"share": 1.0, "channels": "fw"}),
        "channels only, bw": base.model_copy(update={"share": 1.0, "channels": "bw"}),
        "layers, fw": base.model_copy(update={"channels": "fw"}),
        "layers, bw": base.model_copy(update={"channels": "bw"}),
        "layers at random": base.model_copy(update={"pruning": "random"}),
        "last layers": base.model_copy(update={"pruning": "last"}),
    }
    made |= {f"rho {r}": base.model_copy(update={"rho": r}) for r in (0.2, 0.3, 0.7, 0.9)}
    made |= {f"share {s}": base.model_copy(update={"share": s}) for s in (0.05, 0.5)}
    return made


def tune_set() -> dict[str, Rule]:
    """Step sizes to choose from, in a tenth of the training."""
    found: dict[str, Rule] = {}
    for rate in (0.01, 0.03, 0.1, 0.3):
        found |= {f"MAML {rate}": MAML(rate=rate), f"BOIL {rate}": BOIL(rate=rate)}
        found |= {f"Reptile {rate}": Reptile(rate=rate), f"MAML++ {rate}": MAMLPP(rate=rate)}
        found |= {f"p-Meta {rate}": PMeta(rate=rate)}
    found |= {f"ANIL {rate}": ANIL(rate=rate) for rate in (0.03, 0.1, 0.3, 1.0)}
    return found


SETS = {"frozen": frozen_set, "ablation": ablation_set, "tune": tune_set}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    verbs = {"train": train, "table": table, "costs": costs_of_settings}
    verbs[args.verb](args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("train", "table", "costs"))
    parser.add_argument("--setting", choices=SETTINGS, default="omniglot-5w1s")
    parser.add_argument("--set", choices=("main", *SETS), default="main")
    parser.add_argument("--rules", default="", help="some of the set's, by label: a;b")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="in the place of the setting's")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--out", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---- data ---------------------------------------------------------------------------------------


def sources(setting: Setting) -> tuple[Episodes, Episodes, Episodes]:
    """(train, validation, test): no class is in two of them."""
    rule = FixedEpisodes(ways=setting.ways, shots=setting.shots, queries=setting.queries)
    if setting.data == "omniglot":
        shown = Preprocess(size=28, mean=(0.5,), std=(0.5,))
        everything = omniglot()
        names = shuffled(everything.classes)
        parts = names[:150], names[150:192], names[192:]
        first, second, third = (everything.of_classes(part) for part in parts)
        train = Episodes(rotated(first, shown), shown, rule)
        return (
            train,
            Episodes(second, shown, rule, apart=True),
            Episodes(third, shown, rule, apart=True),
        )
    shown = Preprocess(size=64)
    tiny = load(backbones.SHARED / "data" / "tiny_imagenet.zip")
    names = sorted(tiny.classes)
    parts = names[:130], names[130:160], names[160:]
    first, second, third = (Episodes(tiny.of_classes(p), shown, rule) for p in parts)
    return first, second, third


def omniglot() -> Labelled:
    """All characters, each once, grouped by drawer: file names end with the drawer's number."""
    images, labels, classes, groups = [], [], [], []
    shown = Preprocess(size=28, mean=(0.0,), std=(1.0,))
    for k in (1, 2):
        part = load(backbones.SHARED / "data" / f"omniglot_small{k}.zip", class_level=2)
        x, y = arrays(part, shown)
        for c, name in enumerate(part.classes):
            if name in classes:
                continue
            rows = np.flatnonzero(y == c)
            images.append(x[rows])
            labels += [len(classes)] * len(rows)
            groups += [Path(part.names[r]).stem.rpartition("_")[2] for r in rows]
            classes.append(name)
    pixels = np.concatenate(images).transpose(0, 2, 3, 1)
    made = load((pixels, np.array(labels)), classes=tuple(classes))
    return Labelled(made.source, made.index, made.labels, made.classes, tuple(groups))


def rotated(data: Labelled, shown: Preprocess) -> Labelled:
    """Each class in four rotations, which are classes of their own."""
    x = np.stack([data.image(i) for i in range(len(data))])
    turned = np.concatenate([np.rot90(x, k, axes=(1, 2)) for k in range(4)])
    n = len(data.classes)
    labels = np.concatenate([data.labels + k * n for k in range(4)])
    return load((np.ascontiguousarray(turned), labels))


def shuffled(names: tuple[str, ...]) -> list[str]:
    """In an order that depends on nothing but the names."""
    return sorted(names, key=lambda name: zlib.crc32(name.encode()))


def network(setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if setting.net == "resnet12":
        return ResNet12(setting.ways, width=0.25)
    return Conv4(setting.ways, 32, 1 if grey(setting) else 3, 28 if grey(setting) else 64)


# ---- training -----------------------------------------------------------------------------------


def chosen(args: argparse.Namespace) -> dict[str, Rule]:
    rules = SETS[args.set]() if args.set in SETS else main_set(SETTINGS[args.setting])
    return {k: v for k, v in rules.items() if not args.rules or k in args.rules.split(";")}


def train(args: argparse.Namespace) -> None:
    setting = SETTINGS[args.setting]
    parts = sources(setting)
    epochs = args.epochs or (1 if args.set == "tune" else setting.epochs)
    for label, rule in chosen(args).items():
        for seed in range(args.seeds):
            folder = args.out / args.setting / f"{label}-{seed}"
            net = network(setting, seed)
            learns = few_shot(net, setting.ways) if isinstance(rule, ProtoNet) else net
            adam = {"optimizer": "adam", "rate": 1e-3, "final_rate": 1e-5, "clip": 10.0}
            outer = {} if isinstance(rule, Reptile) else adam  # Reptile's is no gradient
            config = MetaTrain(
                epochs=epochs, episodes=setting.episodes, tasks=4, rule=rule, warmup=0,
                warmup_rate=0, seed=seed, validation=100, **outer,
            )  # fmt: skip
            if (folder / "result.json").exists():
                known = json.loads((folder / "result.json").read_text())["config"]
                if known != config.model_dump(mode="json"):
                    sys.exit(f"{folder} has a training of another config: move it, or give --out")
                continue
            print(f"{args.setting}, {label}, seed {seed}", file=sys.stderr, flush=True)
            trace = metatrain(
                learns, parts[0], None, config, out=folder, validation=parts[1],
                test=None if args.set == "tune" else parts[2], test_tasks=args.test_tasks,
                progress=True,
            )  # fmt: skip
            result = {"setting": args.setting, "rule": label, "seed": seed,
                      "config": config.model_dump(mode="json"),
                      "trace": trace.model_dump(mode="json")}  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{args.setting}, {label}, seed {seed}: {trace}", file=sys.stderr, flush=True)


# ---- table --------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    """Accuracy of what was trained, beside the costs of an adaptation to one task."""
    found = {}
    for path in sorted(args.out.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        if result["trace"]["test"] is None or result["setting"] not in SETTINGS:
            continue
        row = trained(result) | costs(SETTINGS[result["setting"]], path.parent)
        found[key(row)] = row
    known = {key(r): recounted(r) for r in rows_of(args.json) if r["rule"] != MEAN}
    every, places = {**known, **found}.values(), [*SETTINGS]
    every = sorted(every, key=lambda row: (places.index(row["setting"]), -row["updates"]))
    parts = ablation_set()
    ablation = [row for row in every if row["rule"] in parts]
    rows, ratios = compared([row for row in every if row["rule"] not in parts])
    for row in [*rows, *ablation]:
        print(f"{row['setting']:18} {row['rule']:22} {row['seed']}  "
              f"{100 * row['accuracy']:6.2f} ± {100 * row['interval']:.2f} %  "
              f"{row['peak_kb']:8.1f} KiB (measured {row.get('measured_peak_kb', 0.0):8.1f})  "
              f"{row['gmacs']:.4f} GMACs  {row.get('steps', '')}")  # fmt: skip
    for row in ratios:
        print(row)
    show(args, {"rows": rows, "ratios": ratios, "ablation": ablation})


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        made = {
            "command": f"python benchmarks/pmeta.py {args.verb} --json {args.json.name}",
            "python": platform.python_version(), "torch": torch.__version__,
            "cores": os.cpu_count(), **result,
        }  # fmt: skip
        args.json.write_text(json.dumps(made, indent=1) + "\n")


MEAN = "mean of four"
FOUR = ("MAML", "ANIL", "BOIL", "MAML++")


def key(row: dict[str, Any]) -> tuple[str, str, Any]:
    return row["setting"], row["rule"], row["seed"]


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    """Those of an earlier table."""
    made = json.loads(path.read_text()) if path and path.exists() else {}
    return [*made.get("rows", ()), *made.get("ablation", ())]


def trained(result: dict[str, Any]) -> dict[str, Any]:
    test, config = result["trace"]["test"], result["config"]
    return {
        "setting": result["setting"], "rule": result["rule"], "seed": result["seed"],
        "epochs": config["epochs"],
        "updates": config["epochs"] * config["episodes"] // config["tasks"],
        "accuracy": test["mean"], "interval": test["interval"], "test_tasks": test["tasks"],
        "hours": result["trace"]["seconds"] / 3600,
    }  # fmt: skip


def costs(setting: Setting, folder: Path) -> dict[str, Any]:
    """Of an adaptation to the first test task from the trained weights: see AdaptationCost."""
    net = network(setting, 0)
    state = torch.load(folder / "learner.pt", weights_only=True)
    start = few_shot(net, setting.ways) if state["rule"]["kind"] == "protonet" else net
    _, learner = load_learner(start, folder / "learner.pt")
    learner.write_to(start)
    return counted(setting, net, learner)


def recounted(row: dict[str, Any]) -> dict[str, Any]:
    """A row of another machine: what an adaptation takes depends on no weights, but for p-Meta."""
    setting = SETTINGS[row["setting"]]
    rule = main_set(setting).get(row["rule"])
    if "measured_gmacs" in row or not isinstance(rule, MAML | Reptile) or isinstance(rule, PMeta):
        return row
    net = network(setting, 0)
    return row | counted(setting, net, rule.learner(net))


def counted(setting: Setting, net: nn.Module, learner: Learner) -> dict[str, Any]:
    x, y, _, _ = test_tasks(setting).draw(TEST_SEED, 0)
    return priced(adaptation_cost(net, learner.eval(), (torch.from_numpy(x), torch.from_numpy(y))))


@cache
def test_tasks(setting: Setting) -> Episodes:
    return sources(setting)[2]


def priced(c: AdaptationCost) -> dict[str, Any]:
    """In KiB, forward and backward pass together but for `backward_kb` and `measured_kb`:
    all samples at once, frozen layers a sample at a time, and all layers a sample at a time."""
    found = {
        "backward_kb": c.backward / 1024, "measured_kb": c.measured_backward / 1024,
        "at_once_kb": max(c.forward, c.backward) / 1024,
        "measured_at_once_kb": max(c.measured_forward, c.measured_backward) / 1024,
        "peak_kb": c.peak / 1024, "measured_peak_kb": c.measured_peak / 1024,
        "board_kb": c.board / 1024, "gmacs": c.macs / 1e9, "streamed_gmacs": c.streamed_macs / 1e9,
        "measured_gmacs": c.measured_macs / 1e9, "board_gmacs": c.board_macs / 1e9,
        "measured_streamed_gmacs": c.measured_streamed_macs / 1e9,
        "steps": " ".join(map(str, c.layers)),
    }  # fmt: skip
    return {k: v for k, v in found.items() if c.layers or not k.startswith("measured")}


def compared(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows with the mean of MAML, ANIL, BOIL and MAML++ in each setting that has them all, after
    as many updates, how many times as much as each p-Meta that mean is)."""
    made, ratios = [], []
    for setting, updates in dict.fromkeys((row["setting"], row["updates"]) for row in rows):
        group = [r for r in rows if (r["setting"], r["updates"]) == (setting, updates)]
        made += group
        four = [r for r in group if r["rule"] in FOUR]
        if len({r["rule"] for r in four}) < 4:
            continue
        keys = [k for k, v in four[0].items() if isinstance(v, float) and all(k in r for r in four)]
        mean = {k: float(np.mean([r[k] for r in four])) for k in keys}
        best = max(four, key=lambda r: r["accuracy"])
        made.append({"setting": setting, "rule": MEAN, "seed": "-", "updates": updates, **mean,
                     "best": best["accuracy"]})  # fmt: skip
        for row in (r for r in group if r["rule"].startswith("p-Meta")):
            shown = [k for k in keys if k.endswith(("_kb", "gmacs")) and row.get(k)]
            times = {k: mean[k] / row[k] for k in shown}
            ratios.append({
                "setting": setting, "rule": row["rule"], "seed": row["seed"],
                "below_best": best["accuracy"] - row["accuracy"], **times,
            })  # fmt: skip
    return made, ratios


# ---- costs --------------------------------------------------------------------------------------


def costs_of_settings(args: argparse.Namespace) -> None:
    """What an adaptation holds in each setting, counted in three ways; nothing is trained.

    p-Meta has the last layers, in as many of them as keep its limit.
    """
    rows = []
    for name, setting in SETTINGS.items():
        for norms in ("batch", "frozen"):
            rows += conventions(name, setting, norms)
            for row in rows[-3 if norms == "frozen" else -2 :]:
                print(row)
    show(args, {"rows": rows})


def conventions(name: str, setting: Setting, norms: str) -> list[dict[str, Any]]:
    rules = {
        "MAML": MAML(rate=0.1, norms=norms), "ANIL": ANIL(rate=0.1, norms=norms),
        "BOIL": BOIL(rate=0.1, norms=norms), "MAML++": MAMLPP(rate=0.1, norms=norms),
        "p-Meta": PMeta(rate=0.1, norms=norms, pruning="last", share=share(setting)),
        "none": MAML(rate=0.1, judged=0),
    }  # fmt: skip
    shape = (1, 28, 28) if grey(setting) else (3, 64, 64)
    x = torch.randn(setting.ways * setting.shots, *shape)
    support = x, torch.arange(len(x)) % setting.ways
    found = {}
    for label, rule in rules.items():
        net = network(setting, 0)
        learner = rule.learner(net).eval()
        if isinstance(rule, PMeta):
            learner.progress = 1.0
            learner.keep_limits(shape, len(x), "cross_entropy")
        found[label] = adaptation_cost(net, learner, support)
    counted = {
        "all samples at once": ("at_once_kb", "measured_at_once_kb", "gmacs", "measured_gmacs"),
        "frozen layers a sample at a time": (
            "peak_kb", "measured_peak_kb", "streamed_gmacs", "measured_streamed_gmacs"
        ),
    }  # fmt: skip
    if norms == "frozen":  # on a board statistics of the batch are those of a sample
        counted["all layers a sample at a time"] = ("board_kb", None, "board_gmacs", None)
    priced_ = {label: priced(cost) for label, cost in found.items()}
    rows = []
    for convention, keys in counted.items():
        columns = {}
        titles = "plan_kb", "measured_kb", "gmacs", "measured_gmacs"
        for key, title in zip(keys, titles, strict=True):
            if key is None:
                continue
            four = float(np.mean([priced_[label][key] for label in FOUR]))
            ours = priced_["p-Meta"][key]
            columns |= {f"four_{title}": four, f"ours_{title}": ours, f"{title}_times": four / ours}
        rows.append({
            "setting": name, "norms": norms, "held": convention, **columns,
            "steps": priced_["p-Meta"]["steps"], "prediction_kb": priced_["none"][keys[0]],
        })  # fmt: skip
    return rows


def grey(setting: Setting) -> bool:
    return setting.data == "omniglot"


if __name__ == "__main__":
    main()
