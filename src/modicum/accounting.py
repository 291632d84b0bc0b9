"""What a plan computes and keeps, layer by layer and block by block, for a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.blocks import find_blocks
from modicum.cost import LayerCost
from modicum.errors import UsageError
from modicum.graph import Frozen
from modicum.plan import Pattern, Plan
from modicum.units import count, size


class Row(Frozen):
    """MACs, FLOPs and kept bytes of one layer, one block, or the whole, for the batch.

    flops: 2 for a MAC and 1 for every other addition, multiplication, division, comparison or
    exponential, such as those of norms and activations.  saved: bytes kept from the forward to
    the backward pass; what two layers share counts where it is first kept.
    """

    name: str
    what: str
    macs_forward: int
    macs_backward: int
    flops_forward: int
    flops_backward: int
    saved: int


class Account(Frozen):
    """The rows of `layers`, of the inverted residual `blocks`, and their `total`.

    `steps` are the inner steps that the account is of: those of one pattern.
    """

    batch: int
    steps: tuple[int, ...]
    inner_steps: int
    layers: tuple[Row, ...]
    blocks: tuple[Row, ...]
    total: Row

    def __str__(self) -> str:
        head = ("", "", "MACs fwd", "MACs bwd", "FLOPs fwd", "FLOPs bwd", "kept")
        cells = [head, *(_cells(r) for r in self.layers)]
        if self.blocks:
            cells += [("", "inverted residual blocks", "", "", "", "", "")]
            cells += [_cells(r) for r in self.blocks]
        cells.append(_cells(self.total))
        widths = [max(len(c[i]) for c in cells) for i in range(len(head))]
        steps = ", ".join(map(str, self.steps))
        of = "" if self.inner_steps == len(self.steps) else f", inner steps {steps}"
        lines = [f"For a batch of {self.batch}{of}:"]
        for c in cells:
            left = [f"{c[i]:<{widths[i]}}" for i in (0, 1)]
            right = [f"{c[i]:>{widths[i]}}" for i in range(2, len(head))]
            lines.append("  ".join([*left, *right]).rstrip())
        return "\n".join(lines)


def account(plan: Plan, batch: int = 1, step: int | None = None) -> Account:
    """MACs, FLOPs and kept bytes of one step with `batch` samples.

    Kept bytes grow with the batch but for bits, which are packed over all of it, and statistics
    of a batch, of which there is one set.  Where inner steps differ in what they update, it is the
    account of the inner step `step`; without it, of those that keep most.  Raises UsageError for a
    batch below 1.
    """
    if batch < 1:
        raise UsageError(f"a batch of {batch} samples", hint="1 or more")
    if step is not None:
        return _account(plan, batch, plan.patterns[plan.pattern_of(step)])
    accounts = [_account(plan, batch, pattern) for pattern in plan.patterns]
    return max(accounts, key=lambda a: a.total.saved)


def _account(plan: Plan, batch: int, pattern: Pattern) -> Account:
    once = {node.name for node in plan.program.graph.nodes if node.op == "batch_stat_norm"}
    rows = [_row(layer.name, layer.op, [layer], batch, once) for layer in pattern.layers]
    by_name = {layer.name: layer for layer in pattern.layers}
    blocks = [
        _row(b.name, f"{len(b.nodes)} nodes", [by_name[n] for n in b.nodes if n in by_name],
             batch, once)
        for b in find_blocks(plan.graph)
    ]  # fmt: skip
    total = _row("total", f"{len(rows)} nodes", pattern.layers, batch, once)
    return Account(
        batch=batch,
        steps=pattern.steps,
        inner_steps=plan.inner_steps,
        layers=tuple(rows),
        blocks=tuple(blocks),
        total=total,
    )


def _row(name: str, what: str, layers: Sequence[LayerCost], batch: int, once: set[str]) -> Row:
    return Row(
        name=name,
        what=what,
        macs_forward=batch * sum(c.macs_forward for c in layers),
        macs_backward=batch * sum(c.macs_dx + c.macs_dw for c in layers),
        flops_forward=batch * sum(c.flops[0] for c in layers),
        flops_backward=batch * sum(c.flops[1] for c in layers),
        saved=sum(_saved(c, batch, once) for c in layers),
    )


def _saved(layer: LayerCost, batch: int, once: set[str]) -> int:
    return sum(
        n if kind == "stats" and layer.name in once else n * batch for kind, n, _ in layer.kept
    )


def _cells(r: Row) -> tuple[str, ...]:
    numbers = (r.macs_forward, r.macs_backward, r.flops_forward, r.flops_backward)
    return (r.name, r.what, *(count(n) if n else "-" for n in numbers), size(r.saved))
