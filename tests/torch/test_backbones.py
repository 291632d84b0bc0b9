"""The three published networks of shared/weights: what the plan promises of them holds."""

from __future__ import annotations

import itertools
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from oracle import difference, held_bytes, total_loss, tuned_gradients
from torch import Tensor, nn

import modicum as mo
from modicum.apply import Tuned
from modicum.graph import Graph
from modicum.memory import verify

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

NAMES = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")
UPDATES = {"head": mo.Last(n=1), "bias": mo.Bias(), "last 6 blocks": mo.Last(n=19),
           "all": mo.Full()}  # fmt: skip

pytestmark = [
    pytest.mark.needs_shared("weights/README.md"),
    pytest.mark.parametrize("name", NAMES),
]
each_update = pytest.mark.parametrize("update", UPDATES)


@cache
def backbone(name: str) -> tuple[nn.Module, Graph, Tensor]:
    import backbones

    backbones.SHARED = SHARED
    model = backbones.load(name)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 128, 128, generator=g) * 2 - 1
    return model, mo.capture(model, x), x


@cache
def planned(name: str, update: str) -> mo.Plan:
    return mo.plan(backbone(name)[1], method=UPDATES[update])


@each_update
def test_the_arena_is_within_5_percent_of_the_lower_bound_and_holds(name, update):
    plan = planned(name, update)
    assert plan.cost.lower_bound <= plan.cost.arena <= 1.05 * plan.cost.lower_bound
    assert plan.cost.floor <= plan.cost.lower_bound
    verify(plan.program, plan.offsets, plan.cost.arena)


@each_update
def test_autograd_holds_what_the_plan_saves(name, update):
    model, _, x = backbone(name)
    plan = planned(name, update)
    assert held_bytes(Tuned(model, plan), x.clone()) == plan.cost.saved


@cache
def dense_gradients(name: str) -> dict[str, Tensor]:
    model, _, x = backbone(name)
    model.requires_grad_(True)
    model.zero_grad()
    total_loss("cross_entropy", model(x), torch.tensor([3])).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@each_update
def test_the_gradients_are_those_of_autograd(name, update):
    model, _, x = backbone(name)
    got = tuned_gradients(Tuned(model, planned(name, update)), x, torch.tensor([3]))
    want = dense_gradients(name)
    largest, where = difference(got, {n: want[n] for n in got})
    assert largest < 1e-4, where


def test_training_biases_keeps_a_twentieth_of_what_pytorch_keeps(name):
    kept = planned(name, "bias").cost.saved
    model, _, x = backbone(name)
    model.requires_grad_(True)
    assert kept <= held_bytes(model, x.clone()) / 20
    if name == "mcunet-5fps":
        assert kept <= 6045 * 1024 / 20


def test_a_smaller_update_never_costs_more(name):
    costs = [planned(name, update).cost for update in ("head", "last 6 blocks", "all")]
    for a, b in itertools.pairwise(costs):
        assert a.saved <= b.saved and a.arena <= b.arena
        assert a.macs_backward <= b.macs_backward and a.trained_params < b.trained_params
    assert len({c.macs_forward for c in costs}) == 1
