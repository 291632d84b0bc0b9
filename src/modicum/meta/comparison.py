"""Rules of meta-learning trained alike: who is more accurate at what cost."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from modicum.errors import UsageError
from modicum.heads import few_shot
from modicum.meta.config import MetaTrain
from modicum.meta.costs import adaptation_cost
from modicum.meta.learner import Rule
from modicum.meta.sources import TaskSource
from modicum.meta.train import load_learner, metatrain
from modicum.report.rules import RuleComparison, RuleRow


def compare_rules(
    net: nn.Module,
    rules: Mapping[str, Rule],
    train: TaskSource,
    test: TaskSource,
    config: MetaTrain | None = None,
    *,
    out: str | Path,
    validation: TaskSource | None = None,
    test_tasks: int = 600,
    progress: bool = False,
) -> RuleComparison:
    """Meta-train copies of `net` by each rule, judge them on the same tasks, and price adapting.

    `config` gives everything but the rule; ProtoNet learns the net under a cosine head.  Every
    rule has a folder below `out`, in which a rerun goes on; `out` gets the table as .json and
    .txt.  A rule that does not apply to the net is listed with the reason.  Raises as `metatrain`.
    """
    base, rows, left_out = config or MetaTrain(), [], {}
    given = base.model_dump(exclude={"rule"}, exclude_unset=True)
    xs, ys, _, _ = test.draw(0, 0)
    support = torch.from_numpy(xs), torch.from_numpy(ys)
    for label, rule in rules.items():
        made = MetaTrain(rule=rule, **given)
        start = copy.deepcopy(net)
        prototypes = rule.kind == "protonet"
        learns = few_shot(start, max(2, int(ys.max()) + 1)) if prototypes else start
        folder = Path(out) / re.sub(r"[^\w.+=-]+", "-", label)  # any system takes such a name
        if progress:
            print(f"{label}:", file=sys.stderr, flush=True)
        try:
            trace = metatrain(
                learns, train, None, made, out=folder, validation=validation, test=test,
                test_tasks=test_tasks, progress=progress,
            )  # fmt: skip
        except UsageError as error:
            left_out[label] = error.what
            continue
        assert trace.test is not None
        _, learner = load_learner(learns, folder / "learner.pt")
        rows.append(
            RuleRow(
                label=label,
                score=trace.test.mean,
                interval=trace.test.interval,
                labels=trace.test.labels,
                seconds=trace.seconds,
                cost=adaptation_cost(start, learner, support),
            )
        )
    if not rows:
        raise UsageError("none of the rules could be compared", why=[*left_out.values()])
    comparison = RuleComparison(tasks=test_tasks, rows=tuple(rows), left_out=left_out)
    comparison.save(Path(out))
    return comparison
