"""MobileTL: the sign mask is its definition, blocks keep what the paper says or less."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import held_bytes, randomise
from torch import nn

import modicum as mo
from modicum.accounting import account
from modicum.apply import Tuned, pack_mask, unpack_mask
from modicum.graph import Node
from modicum.models import MODELS
from modicum.models.inverted_residual import PLAIN, InvertedResidual, Row
from modicum.ops import OPS
from modicum.ops.base import Wanted

KINKS = torch.tensor([-1e9, -7.0, -6.0, -3.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3.0, 6.0, 7.0, 1e9])


def activation(op: str, **attrs: object) -> Node:
    return Node(name="y", op=op, inputs=("x",), attrs={**attrs, "sign": True})


SIGNED = {
    "relu": activation("clamp", lo=0.0, hi=None),
    "relu6": activation("clamp", lo=0.0, hi=6.0),
    "hardswish": activation("hardswish"),
    "silu": activation("silu"),
}
EXACT = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "hardswish": nn.functional.hardswish,
    "silu": nn.functional.silu,
}


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("packed", [False, True])
def test_the_sign_mask_is_bit_for_bit_g_times_1_where_a_is_not_negative(name, packed):
    node, op = SIGNED[name], OPS[SIGNED[name].op]
    a = torch.cat([torch.randn(3000), KINKS])
    g = torch.randn(a.shape)
    y = op.forward(node, [a], {})
    assert torch.equal(y, EXACT[name](a))  # the forward pass stays exact
    kept = y
    if packed:
        bits = pack_mask(op.mask(node, y))
        assert bits.dtype == torch.uint8 and bits.numel() == -(-a.numel() // 8)
        kept = unpack_mask(bits, tuple(a.shape))
    ((got,), _) = op.backward(node, g, [kept], {}, Wanted((True,)), [a.shape])
    want = g * (a >= 0)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardswish])
def test_a_net_trains_through_sign_masks_as_a_custom_autograd_function_does(kind):
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return kind()(a)

        @staticmethod
        def backward(ctx, g):
            return g * (ctx.saved_tensors[0] >= 0)

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), kind(), nn.Conv2d(6, 4, 1), kind(), nn.Flatten(), nn.Linear(64, 2)
    )
    x = torch.randn(2, 3, 6, 6)
    method = mo.Explicit(params={"*": None}, sign=("*",))
    plan = mo.plan(mo.capture(model, x), method=method)
    tuned = mo.apply(model, plan)
    tuned(x).square().sum().backward()
    y = x
    for layer in model:
        y = Sign.apply(y) if isinstance(layer, kind) else layer(y)
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(tuned.trained[name].grad, p.grad, rtol=1e-5, atol=1e-6), name


def test_the_gradient_of_a_shift_only_norm_is_autograds():
    model = randomise(nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Hardswish(),
        nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 3),
    )).double()  # fmt: skip
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    shifts = ("1.bias", "4.bias")
    graph = mo.capture(copy.deepcopy(model).float(), x[:1].float())
    plan = mo.plan(graph, method=mo.Explicit(params=dict.fromkeys(shifts)))
    assert {kind for row in plan.layers for kind, _, _ in row.kept} == {"value"}
    assert [row.op for row in plan.layers if row.kept] == ["hardswish"]  # no norm keeps anything
    tuned = Tuned(copy.deepcopy(model).float(), plan)
    tuned(x.float()).square().sum().backward()
    for p in model.parameters():
        p.grad = None
    model(x).square().sum().backward()
    params = dict(model.named_parameters())
    for name in shifts:
        grad = params[name].grad
        assert (tuned.trained[name].grad - grad).abs().max() < 1e-4 * grad.abs().max()


# ---- batch statistics ------------------------------------------------------------------------


def test_batch_statistics_are_those_of_pytorchs_training_mode_and_are_followed():
    model = randomise(nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU6(),
        nn.Flatten(), nn.Linear(216, 3),
    ))  # fmt: skip
    x = torch.randn(5, 3, 8, 8)
    plan = mo.plan(mo.capture(model, x), method=mo.Full(norms="batch"))
    tuned, plain = mo.apply(model, plan), copy.deepcopy(model)
    plain[1].train()
    for _ in range(3):
        a, b = tuned(x), plain(x)
        assert torch.allclose(a, b, atol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
    for name, p in plain.named_parameters():
        want = tuned.trained[name].grad
        assert (want - p.grad).abs().max() < 1e-4 * max(1.0, p.grad.abs().max()), name
    tuned.eval()
    plain.eval()
    assert torch.allclose(tuned(x), plain(x), atol=1e-5)
    tuned.write_to(model)
    for name, value in plain.named_buffers():
        if value.is_floating_point():
            assert torch.allclose(model.get_buffer(name), value, atol=1e-6), name


def test_prediction_leaves_running_statistics_alone():
    entry = MODELS["mobilenet_v3_small"]
    net = entry.make(4)
    plan = mo.plan(mo.capture(net, torch.zeros(1, 3, 64, 64)), method=mo.Blocks(blocks=1))
    tuned = mo.apply(net, plan).eval()
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    with torch.no_grad():
        tuned(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())


def test_statistics_of_a_single_value_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 4), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    graph = mo.capture(model, torch.zeros(1, 2, 4, 4))
    with pytest.raises(mo.ModicumError, match="single pixel"):
        mo.plan(graph, method=mo.Full(norms="batch"))


def test_a_norm_without_momentum_cannot_follow_the_batch():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.Flatten())
    graph = mo.capture(model, torch.zeros(1, 2, 6, 6))
    with pytest.raises(mo.ModicumError, match="cannot follow"):
        mo.plan(graph, method=mo.Full(norms="batch"))


# ---- the paper's figures ---------------------------------------------------------------------


class OneBlock(nn.Module):
    def __init__(self, act: type[nn.Module], squeeze: int) -> None:
        super().__init__()
        row = Row(3, 6 * 96, 96, squeeze=squeeze, act=act)
        self.block = InvertedResidual(96, row, PLAIN)

    def forward(self, x):
        return self.block(x).mean([2, 3])


@pytest.mark.parametrize(
    ("act", "squeeze", "least"), [(nn.ReLU6, 0, 0.463), (nn.Hardswish, 144, 0.533)]
)
def test_a_block_keeps_less_by_the_papers_share_planned_and_measured(act, squeeze, least):
    model, x = OneBlock(act, squeeze), torch.randn(8, 96, 7, 7)
    graph = mo.capture(model, x)
    kept = {}
    for method in (mo.Blocks(blocks=1), mo.MobileTL(blocks=1)):
        plan = mo.plan(graph, method=method, loss="mse")
        kept[method.kind] = account(plan, 8).total.saved
        assert held_bytes(mo.apply(model, plan), x.clone()) == kept[method.kind]
    assert 1 - kept["mobiletl"] / kept["blocks"] >= least
    plain = held_bytes(model.train(), x.clone())
    assert 1 - kept["mobiletl"] / plain >= least


def test_five_blocks_of_mobilenet_v3_small_cost_what_the_paper_says_or_less():
    graph = mo.capture(MODELS["mobilenet_v3_small"].make(100), torch.zeros(1, 3, 224, 224))
    full, exact, mobiletl = (
        account(mo.plan(graph, method=m), 8).total
        for m in (mo.Full(norms="batch"), mo.Blocks(blocks=5), mo.MobileTL(blocks=5))
    )
    assert full.saved / 1e6 == pytest.approx(129.7, rel=0.01)  # the paper's figures, MB
    assert exact.saved / 1e6 == pytest.approx(35.9, rel=0.01)
    flops = [t.flops_forward + t.flops_backward for t in (full, mobiletl)]
    assert 1 - flops[1] / flops[0] >= 0.36
    assert 1 - mobiletl.saved / full.saved >= 0.69
