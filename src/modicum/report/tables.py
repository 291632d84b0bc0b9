"""Tables: what the plan says of memory, of the arena's buffers and of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from modicum.cost import LayerCost
from modicum.lower import Program
from modicum.memory import persistent_bytes
from modicum.ops import OPS
from modicum.plan import Plan
from modicum.report.palette import KINDS
from modicum.report.runs import plain
from modicum.units import count, kib, percent, size

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Memory:
    """The arena in its two parts, and the bytes live during every step by kind."""

    persistent: int
    dynamic: int
    live: Mapping[str, Numbers]

    @property
    def total(self) -> Numbers:
        total: Numbers = np.sum(list(self.live.values()), axis=0)
        return total


def memory_of(p: Plan) -> Memory:
    program = p.program
    persistent = persistent_bytes(program, p.offsets)
    live: dict[str, Numbers] = {}
    for name, (first, last) in program.lifetimes.items():
        buffer = program.buffers[name]
        live.setdefault(buffer.kind, np.zeros(len(program.steps)))[first : last + 1] += buffer.bytes
    return Memory(persistent, p.cost.arena - persistent, {k: live[k] for k in KINDS if k in live})


@dataclass(frozen=True)
class Layer:
    """A layer with parameters and what follows it up to the next one, for the picture."""

    name: str
    status: str
    params: int
    trained: int
    forward: int
    backward: int
    kept: int


def status_of(program: Program, row: LayerCost) -> str:
    if row.trained:
        return "trained"
    return "passes gradient" if any(program.wanted[row.name].dx) else "frozen"


def picture_layers(p: Plan) -> list[Layer]:
    """One row per layer with parameters; nodes without any are counted with the layer before."""
    program = p.program
    updated = {t.param: t.size for t in program.updated}
    rows: list[Layer] = []
    for row, node in zip(p.layers, program.graph.nodes, strict=True):
        names = [node.params[role] for role in OPS[node.op].roles if role in node.params]
        layer = Layer(
            name=plain(row.name),
            status=status_of(program, row),
            params=sum(program.graph.params[n].size for n in names),
            trained=sum(updated.get(n, 0) for n in names),
            forward=row.macs_forward,
            backward=row.macs_dx + row.macs_dw,
            kept=sum(n for _, n, _ in row.kept),
        )
        if names or not rows:
            rows.append(layer)
        else:
            before = rows[-1]
            rows[-1] = replace(
                before,
                forward=before.forward + layer.forward,
                backward=before.backward + layer.backward,
                kept=before.kept + layer.kept,
            )
    return rows


def plan_rows(p: Plan, m: Memory) -> list[tuple[str, str, str, int]]:
    """(name, figure, words, depth) for every figure of the plan."""
    c = p.cost
    rows = [
        ("Arena", kib(c.arena), "Planned. One static array, as placed: total of the two parts "
         f"below, {percent(c.arena / c.lower_bound - 1)} above the lower bound.", 0),
        ("persistent", kib(m.persistent), "Lives from the first call on.", 1),
        ("trained weights", kib(c.trained_bytes), f"{c.trained_params:,} parameters that are "
         "updated, so they are in RAM.", 2),
        ("optimiser state", kib(c.optimizer_bytes), str(p.optimizer), 2),
    ]  # fmt: skip
    if c.accumulator_bytes:
        text = f"Gradients summed over {p.accumulate} samples until the update."
        rows.append(("accumulated gradients", kib(c.accumulator_bytes), text, 2))
    peak = int(np.argmax(m.total))
    step = p.program.steps[peak]
    at = f"{phase_words(step.phase)} of {plain(step.node)}"
    if int(m.total[peak]) != c.lower_bound:  # another pattern, with a smaller arena, has it
        at = "in another inner step"
    rows += [
        ("dynamic", kib(m.dynamic), "Shared by activations, saved values, gradients and "
         "workspace, each for as long as it lives.", 1),
        ("of it saved", kib(c.saved), "Kept from the forward to the backward pass, one sample. "
         "Not to be added: it lies in the dynamic part.", 2),
        ("Lower bound", kib(c.lower_bound), "Most bytes live at once in a training step, "
         f"persistent ones included: {at}. "
         "No placement is smaller.", 0),
        ("Floor", kib(c.floor), "Most bytes live at once in inference alone, at "
         f"{plain(c.floor_at)}. No choice of layers goes below it.", 0),
        (".data + .bss", kib(c.static), "Planned, beside the arena.", 0),
        ("Stack", kib(c.stack), "Allowance, beside the arena.", 0),
        ("RAM", kib(c.ram), "Total: arena + .data + .bss + stack. " + limit_words(c.ram, p.ram), 0),
        ("Flash", kib(c.flash), "Total: constants and code. " + limit_words(c.flash, p.flash), 0),
        ("weights", kib(c.flash_weights), "Frozen weights, and the initial values of the "
         "trained ones.", 1),
        ("code", kib(c.flash_code), "An estimate.", 1),
        ("MACs forward", count(c.macs_forward), "Multiply-accumulates of one inference.", 0),
        ("MACs backward", count(c.macs_backward), "Of all gradients of one sample.", 0),
        ("Upload", kib(c.upload), "The trained parameters, if a device sends them whole.", 0),
    ]  # fmt: skip
    return rows


def limit_words(n: int, limit: int | None) -> str:
    return "No limit was given." if limit is None else f"Limit {kib(limit)}: {percent(n / limit)}."


def phase_words(phase: str) -> str:
    return "saving" if phase == "save" else phase


def buffer_rows(p: Plan, most: int = 12) -> list[tuple[str, str, str, str, str]]:
    """The largest buffers of the arena: name, kind, bytes, offset, and when they live."""
    program, rows = p.program, []
    largest = sorted(program.buffers.values(), key=lambda b: -b.bytes)[:most]
    for b in largest:
        first, last = program.lifetimes[b.name]
        lives = f"step {first}" if first == last else f"steps {first} to {last}"
        lives = "always" if b.persistent else lives
        kind = KINDS[b.kind][0]
        rows.append((plain(b.value), kind, kib(b.bytes), f"{p.offsets[b.name]:,}", lives))
    return rows


def layer_rows(p: Plan) -> tuple[int, list[dict[str, str]]]:
    """How many nodes come before the first that takes part in the backward pass; the others."""
    program = p.program
    status = [status_of(program, row) for row in p.layers]
    first = next((i for i, s in enumerate(status) if s != "frozen" or p.layers[i].kept), 0)
    rows = []
    for row, state in list(zip(p.layers, status, strict=True))[first:]:
        kept = [f"{kind} {size(n)}: {why}" if n else f"{kind}: {why}" for kind, n, why in row.kept]
        rows.append(
            {
                "name": plain(row.name),
                "op": row.op,
                "shape": " × ".join(map(str, row.shape[1:])),
                "status": state,
                "trains": ", ".join(row.trained),
                "macs": count(row.macs_forward) if row.macs_forward else "",
                "backward": count(row.macs_dx + row.macs_dw) if row.macs_dx + row.macs_dw else "",
                "kept": "; ".join(kept),
            }
        )
    return first, rows
