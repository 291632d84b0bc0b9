"""The emitted C on this machine against PyTorch, step by step."""

from __future__ import annotations

import shutil

import graphs
import numpy as np
import pytest
import torch
from cases import CASES, Built, Case, build
from emit.folders import Workshop, part
from graphs import explicit, renamed
from hypothesis import HealthCheck, given, reject, settings
from oracle import GraphModel

import modicum as mo
from modicum.adapt import adapt
from modicum.optim import SGD
from modicum.trace import Trace

# Every net once with all of it trained, and every row that differs in more than how much it trains.
ROWS = [
    case
    for case in CASES
    if case.note or case.accumulate > 1 or case.optimizer != SGD(lr=0.05) or case.board
    or isinstance(case.method, mo.Full)
]  # fmt: skip


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_the_emitted_c_trains_as_pytorch_does_in_the_planned_arena(workshop: Workshop, case: Case):
    torch_trace, c_trace = both(workshop, build(case))
    largest, where = part(torch_trace, c_trace)
    assert largest < 1e-4, where
    for a, b in (
        (torch_trace.logits_before, c_trace.logits_before),
        (torch_trace.logits_after, c_trace.logits_after),
    ):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()
    assert torch_trace.accuracy_after == c_trace.accuracy_after
    assert mo.compare(torch_trace, c_trace).same
    assert c_trace.figures["arena_high_water"] == build(case).plan.cost.arena


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job=graphs.jobs())
def test_a_generated_net_trains_in_c_as_in_pytorch(workshop: Workshop, job):
    model = GraphModel(job["graph"])
    graph = mo.capture(model, torch.zeros(job["graph"].shape("input")))
    method = explicit(renamed(job["selection"], job["graph"], graph))
    more = {key: job[key] for key in ("optimizer", "loss", "accumulate")}
    built = Built(None, model, graph, mo.plan(graph, method=method, **more))
    try:
        adapt(model, built.plan, built.samples(7), epochs=1)
    except mo.InvalidInput:  # the training of this one diverges
        reject()
    torch_trace, c_trace = both(workshop, built)
    largest, where = part(torch_trace, c_trace)
    assert largest < 1e-3, where


def both(workshop: Workshop, built: Built) -> tuple[Trace, Trace]:
    x, y = built.samples(7)
    by_torch = adapt(built.model, built.plan, (x, y), epochs=1, record=True, test=(x, y))
    folder = workshop.emit(built)
    data = (x.numpy(), y.numpy())
    in_c = workshop.run(folder, train=data, order=by_torch.order, test=data, record=True)
    shutil.rmtree(folder)
    return by_torch, in_c
