"""The check vectors of an emitted net: what PyTorch saw when it trained on a few samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from modicum.emit.schedule import c_array
from modicum.plan import Plan
from modicum.state import image_to_c, to_c
from modicum.trace import TENSOR_FLOOR, Trace

TOLERANCE = 1e-4
MOST_COMPARED = 64  # elements per trained slice; a large one is sampled with a stride


def vectors_header(plan: Plan, x: Any, y: Any, trace: Trace, logits: list[Any]) -> str:
    """vectors.h: `logits` holds the outputs on each sample before its step."""
    images, steps, body = image_to_c(x), [], []
    for i in range(len(x)):
        body.append(c_array(f"input{i}", images[i], "static const float"))
        body.append(c_array(f"logits{i}", logits[i], "static const float"))
        tensors = []
        for k, t in enumerate(plan.program.learned):
            full = to_c(trace.tensors[t.param][i], t.layout).ravel()
            stride = -(-full.size // MOST_COMPARED)
            part = full[::stride]
            body.append(c_array(f"expected{i}_{k}", part, "static const float"))
            scale = max(float(np.abs(full).max()), TENSOR_FLOOR)
            tensors.append(
                f'  {{"{t.param}", {k}, 0, {stride}, {part.size}, {scale!r}f, expected{i}_{k}}},'
            )
        rows = "\n".join(tensors)
        body.append(f"static const mo_check_tensor_t tensors{i}[] = {{\n{rows}\n}};")
        label, target = (0, f"target{i}") if plan.loss == "mse" else (int(y[i]), "NULL")
        if plan.loss == "mse":
            body.append(c_array(f"target{i}", np.asarray(y[i]), "static const float"))
        loss = repr(float(np.float32(trace.losses[i])))
        steps.append(
            f"  {{input{i}, {label}, {target}, logits{i}, {loss}f, NULL,"
            f" {len(tensors)}, tensors{i}}},"
        )
    head = (
        '/* Made by PyTorch from the same weights and samples. */\n#include "check.h"\n\n'
        f"#define MO_CHECK_STEPS {len(x)}\n#define MO_CHECK_TOLERANCE {TOLERANCE!r}f\n\n"
    )
    table = "static const mo_check_step_t mo_check_steps[MO_CHECK_STEPS] = {\n"
    return head + "\n\n".join(body) + "\n\n" + table + "\n".join(steps) + "\n};\n"
