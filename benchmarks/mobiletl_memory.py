"""What MobileTL keeps and computes, beside the figures of its paper.

    python benchmarks/mobiletl_memory.py [--json FILE]

Part 1: one inverted residual block with expansion 6, as in MobileNetV2 (ReLU6) and MobileNetV3
(Hard-Swish, squeeze-and-excite): 96 channels, 7 x 7, batch 8, so that a tensor of 96 channels has
0.15 MB and one of 576 has 0.90 MB, as in the paper's figure.  Kept bytes by the plan, and as
saved_tensors_hooks measures them: in PyTorch's own training mode, and under `apply`.

Part 2: MobileNetV3-Small, batch 8, 3 x 224 x 224, 100 classes: FLOPs and kept bytes of exact
fine-tuning and of MobileTL.  A MAC is 2 FLOPs, each other operation of a norm, an activation or
a pool is one; the column "MACs alone" leaves those out.  MB are of 10^6 bytes, as in the paper.

The paper: Chiang et al., "MobileTL: On-Device Transfer Learning with Inverted Residual Blocks",
AAAI 2023; its columns are read off its figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modicum as mo
from modicum.accounting import account
from modicum.models import MODELS
from modicum.models.inverted_residual import PLAIN, InvertedResidual, Row

BATCH = 8
CHANNELS, SIZE = 96, 7
MB = 1e6
# stored activations of a block, MB; FLOPs (M, forward and backward) and stored activations, MB
PAPER_BLOCK = {"MobileNetV2": (4.03, 2.16), "MobileNetV3": (6.66, 3.11)}
PAPER_NET = {
    "all": (1000.6, 1934.9, 129.7),
    "5 blocks": (975.0, 902.7, 35.9),
    "3 blocks": (972.1, 655.4, 23.1),
    "1 block": (968.8, 284.3, None),
}


class OneBlock(nn.Module):
    """A block and the mean over its pixels, so that a loss can be taken."""

    def __init__(self, act: type[nn.Module], squeeze: int) -> None:
        super().__init__()
        row = Row(3, 6 * CHANNELS, CHANNELS, squeeze=squeeze, act=act)
        self.block = InvertedResidual(CHANNELS, row, PLAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).mean([2, 3])


BLOCKS = {"MobileNetV2": (nn.ReLU6, 0), "MobileNetV3": (nn.Hardswish, 144)}
PLANS = {
    "exact, batch statistics": mo.Blocks(blocks=1),
    "exact, frozen statistics": mo.Blocks(blocks=1, norms="affine"),
    "MobileTL, last norm batch": mo.MobileTL(blocks=1, last_norm="batch"),
    "MobileTL": mo.MobileTL(blocks=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    blocks = [row for name in BLOCKS for row in block(name)]
    _print(
        blocks, ("block", "update", "planned_mb", "measured_mb", "less", "paper_mb", "paper_less")
    )
    net = network()
    print()
    keys = (
        "update",
        "method",
        "forward_m",
        "backward_m",
        "less",
        "macs_less",
        "kept_mb",
        "kept_less",
    )
    _print(net, (*keys, "paper"))
    if args.json:
        data = {
            "command": "python benchmarks/mobiletl_memory.py --json mobiletl_memory.json",
            "torch": torch.__version__,
            "batch": BATCH,
            "blocks": blocks,
            "rows": net,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")


def block(name: str) -> list[dict[str, Any]]:
    """One row per way to train the block; `less` is relative to exact with batch statistics."""
    model = OneBlock(*BLOCKS[name])
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    graph = mo.capture(model, x)
    paper = dict(zip(("exact, batch statistics", "MobileTL"), PAPER_BLOCK[name], strict=True))
    rows = [{"block": name, "update": "PyTorch, training mode",
             "measured_mb": held(model.train(), x) / MB}]  # fmt: skip
    base = None
    for update, method in PLANS.items():
        plan = mo.plan(graph, method=method, loss="mse")
        planned = account(plan, BATCH).total.saved
        base = base or planned
        row = {
            "block": name,
            "update": update,
            "planned_mb": planned / MB,
            "measured_mb": held(mo.apply(model, plan), x) / MB,
            "less": 1 - planned / base,
        }
        if update in paper:
            row["paper_mb"] = paper[update]
            row["paper_less"] = 1 - paper[update] / PAPER_BLOCK[name][0]
        rows.append(row)
    return rows


def held(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that autograd keeps between the passes, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # the reference keeps the address taken
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


def network() -> list[dict[str, Any]]:
    entry = MODELS["mobilenet_v3_small"]
    graph = mo.capture(entry.make(100), torch.zeros(1, 3, 224, 224))
    methods: list[tuple[str, str, mo.Full | mo.Blocks | mo.MobileTL]] = [
        ("all", "exact", mo.Full(norms="batch")),
    ]
    for n in (5, 3, 1):
        update = f"{n} block" + ("s" if n > 1 else "")
        methods.append((update, "exact", mo.Blocks(blocks=n)))
        methods.append((update, "MobileTL", mo.MobileTL(blocks=n)))
    rows: list[dict[str, Any]] = []
    totals = []
    for update, name, method in methods:
        t = account(mo.plan(graph, method=method), BATCH).total
        totals.append(t)
        first = totals[0]
        forward, backward, kept = PAPER_NET[update]
        paper = f"{forward:.1f} + {backward:.1f} M"
        if kept is not None:
            paper += f", {kept} MB"
        rows.append(
            {
                "update": update,
                "method": name,
                "forward_m": t.flops_forward / 1e6,
                "backward_m": t.flops_backward / 1e6,
                "less": 1 - (t.flops_forward + t.flops_backward)
                / (first.flops_forward + first.flops_backward),
                "macs_less": 1 - (t.macs_forward + t.macs_backward)
                / (first.macs_forward + first.macs_backward),
                "kept_mb": t.saved / MB,
                "kept_less": 1 - t.saved / first.saved,
                "paper": paper if name == "exact" else "",
            }
        )  # fmt: skip
    return rows


def _print(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    cells = [keys, *(tuple(_cell(row.get(k), k) for k in keys) for row in rows)]
    widths = [max(len(c[i]) for c in cells) for i in range(len(keys))]
    for c in cells:
        print("  ".join(f"{v:<{w}}" for v, w in zip(c, widths, strict=True)).rstrip())


def _cell(value: Any, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return (
        f"{value:.1%}"
        if key.endswith("less")
        else f"{value:.3f}"
        if key.endswith("mb")
        else f"{value:.1f}"
    )


if __name__ == "__main__":
    main()
