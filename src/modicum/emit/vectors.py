"""The check vectors of an emitted net: what PyTorch saw when it trained on a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modicum.emit.constants import c_array
from modicum.plan import Plan
from modicum.state import image_to_c, to_c
from modicum.trace import TENSOR_FLOOR, Trace

TOLERANCE = 1e-4
MOST_COMPARED = 64  # elements per trained slice; a large one is sampled with a stride


@dataclass(frozen=True)
class Seen:
    """Training under one plan in PyTorch: the samples, what came of them, outputs before each."""

    plan: Plan
    x: Any
    y: Any
    trace: Trace
    logits: list[Any]


def vectors_header(every: Sequence[Seen]) -> str:
    """vectors.h: of one plan, or of each member of a candidate set."""
    body: list[str] = []
    inputs: dict[bytes, str] = {}
    for member, seen in enumerate(every):
        body += _steps(member, seen, inputs)
    rows = ", ".join(f"{{{len(s.x)}, steps{k}}}" for k, s in enumerate(every))
    head = (
        '/* Made by PyTorch from the same weights and samples. */\n#include "check.h"\n\n'
        f"#define MO_CHECK_MEMBERS {len(every)}\n#define MO_CHECK_TOLERANCE {TOLERANCE!r}f\n\n"
    )
    table = "static const mo_check_member_t mo_check_members[MO_CHECK_MEMBERS] = "
    return head + "\n\n".join(body) + f"\n\n{table}{{{rows}}};\n"


def _steps(member: int, seen: Seen, inputs: dict[bytes, str]) -> list[str]:
    """The arrays of one plan; a sample that `inputs` knows is not written again."""
    plan, trace, body, steps = seen.plan, seen.trace, [], []
    mse = plan.loss == "mse"
    images = image_to_c(seen.x)
    for i, image in enumerate(images):
        at, known = f"{member}_{i}", image.tobytes()
        if known not in inputs:
            inputs[known] = f"input{len(inputs)}"
            body.append(c_array(inputs[known], image, "static const float"))
        body.append(c_array(f"logits{at}", seen.logits[i], "static const float"))
        tensors = []
        for k, t in enumerate(plan.program.learned):
            full = to_c(trace.tensors[t.param][i], t.layout).ravel()
            stride = -(-full.size // MOST_COMPARED)
            part = full[::stride]
            body.append(c_array(f"expected{at}_{k}", part, "static const float"))
            scale = max(float(np.abs(full).max()), TENSOR_FLOOR)
            tensors.append(
                f'  {{"{t.param}", {k}, 0, {stride}, {part.size}, {scale!r}f, expected{at}_{k}}},'
            )
        rows = "\n".join(tensors)
        body.append(f"static const mo_check_tensor_t tensors{at}[] = {{\n{rows}\n}};")
        label, target = (0, f"target{at}") if mse else (int(seen.y[i]), "NULL")
        if mse:
            body.append(c_array(target, np.asarray(seen.y[i]), "static const float"))
        loss = repr(float(np.float32(trace.losses[i])))
        steps.append(
            f"  {{{inputs[known]}, {label}, {target}, logits{at}, {loss}f, NULL,"
            f" {len(tensors)}, tensors{at}}},"
        )
    rows = "\n".join(steps)
    return [*body, f"static const mo_check_step_t steps{member}[] = {{\n{rows}\n}};"]
