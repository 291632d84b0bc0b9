"""Under PyTorch frozen layers take samples a few at a time, and nothing changes but memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modicum.apply import _Moments, apply
from modicum.capture import capture
from modicum.errors import UsageError
from modicum.live import LiveBytes
from modicum.meta import ANIL, MAML, PMeta, adaptation_cost, method_of
from modicum.models import Conv4, ResNet12
from modicum.optim import SGD
from modicum.plan import plan

SAMPLES = 7


def learned(rule, kind: str):
    """(plain net with running statistics of its own, learner); p-Meta has the last layers."""
    torch.manual_seed(0)
    net = Conv4(3, 8, 1, 16) if kind == "conv4" else ResNet12(3, 1, width=0.05)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    learner = rule.learner(net).eval()
    if isinstance(rule, PMeta):
        learner.allowed[: -3 if kind == "conv4" else -5] = False
    return net, learner


def planned(rule, kind="conv4", size=16):
    net, learner = learned(rule, kind)
    learner.write_to(net)
    graph = capture(net.eval(), torch.zeros(1, 1, size, size))
    return net, plan(graph, None, method_of(learner), SGD(lr=1.0))


def stepped(net, made, x, y, chunk, training=True):
    """Outputs, gradients and moved statistics of one step."""
    tuned = apply(net, made).train(training)
    tuned.chunk = chunk
    out = tuned(x)
    nn.functional.cross_entropy(out, y).backward()
    gradients = {n: p.grad for n, p in tuned.trained.items()}
    return out.detach(), gradients, {n: t.clone() for n, t in tuned.moving.items()}


RULES = {
    "p-meta": PMeta(steps=2, rate=0.1),
    "p-meta frozen": PMeta(steps=2, rate=0.1, norms="frozen"),
    "anil": ANIL(steps=2, rate=0.1),
    "maml": MAML(steps=2, rate=0.1),
}


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["conv4", "resnet12"])
def test_a_step_is_the_same(kind, rule, chunk):
    net, made = planned(rule, kind)
    x, y = torch.randn(SAMPLES, 1, 16, 16), torch.arange(SAMPLES) % 3
    whole = stepped(net, made, x, y, None)
    parts = stepped(net, made, x, y, chunk)
    assert torch.allclose(whole[0], parts[0], atol=1e-5)
    for a, b in zip(whole[1:], parts[1:], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.allclose(a[name], b[name], atol=2e-5, rtol=1e-4), name


def test_statistics_of_the_batch_move_the_running_ones():
    net, made = planned(RULES["p-meta"])
    before = copy.deepcopy(net.state_dict())
    x = 3 * torch.randn(SAMPLES, 1, 16, 16)
    moved = stepped(net, made, x, torch.arange(SAMPLES) % 3, 1)[2]
    name = "blocks.0.1.running_mean"
    assert not torch.allclose(moved[name], before[name], atol=1e-3)


def test_in_prediction_norms_use_their_running_statistics():
    net, made = planned(RULES["p-meta"])
    x, y = torch.randn(SAMPLES, 1, 16, 16), torch.arange(SAMPLES) % 3
    whole, parts = (stepped(net, made, x, y, k, training=False)[0] for k in (None, 2))
    assert torch.allclose(whole, parts, atol=1e-5)
    alone = stepped(net, made, x[:3], y[:3], 2, training=False)[0]
    assert torch.allclose(alone, whole[:3], atol=1e-5)


def test_another_inner_step_freezes_other_layers():
    net, learner = learned(RULES["p-meta"], "conv4")
    learner.allowed[2, 1] = False
    learner.write_to(net)
    graph = capture(net.eval(), torch.zeros(1, 1, 16, 16))
    made = plan(graph, None, method_of(learner), SGD(lr=1.0))
    tuned, other = apply(net, made).train(), apply(net, made).train()
    tuned.chunk = 2
    x = torch.randn(SAMPLES, 1, 16, 16)
    for k in (0, 1):
        tuned.inner_step = other.inner_step = k
        assert torch.allclose(tuned(x), other(x), atol=1e-5)


def test_no_sample_at_a_time_is_refused():
    net, made = planned(RULES["p-meta"])
    tuned = apply(net, made)
    tuned.chunk = 0
    with pytest.raises(UsageError, match="0 samples"):
        tuned(torch.randn(SAMPLES, 1, 16, 16))


def test_less_is_held_and_the_plan_says_how_much():
    """p-Meta's frozen layers hold most of what a forward pass holds; MAML has none."""
    x, y = torch.randn(10, 1, 28, 28), torch.arange(10) % 5
    costs = {}
    for label, rule in {"p-meta": RULES["p-meta"], "maml": RULES["maml"]}.items():
        torch.manual_seed(0)
        net = Conv4(5, 16, 1, 28)
        learner = rule.learner(net).eval()
        if label == "p-meta":
            learner.allowed[:-3] = False
        costs[label] = adaptation_cost(net, learner, (x, y))
    ours, maml = costs["p-meta"], costs["maml"]
    assert ours.streamed < ours.forward / 2
    assert ours.measured_streamed < ours.measured_forward / 2
    # the plan counts the samples, and PyTorch's pools hold positions
    assert 0.8 * ours.streamed < ours.measured_streamed < 1.3 * ours.streamed
    assert ours.macs < ours.streamed_macs <= 1.25 * ours.macs
    assert maml.measured_macs == maml.macs == maml.measured_streamed_macs
    # the plan counts the most channels that attention can leave
    assert 0.9 * ours.macs < ours.measured_macs <= ours.macs
    again = ours.streamed_macs - ours.macs
    assert ours.measured_streamed_macs - ours.measured_macs == again
    assert maml.streamed == maml.forward and maml.streamed_macs == maml.macs
    assert maml.measured_streamed == maml.measured_forward


def test_on_a_board_gradients_are_summed_beside_one_sample():
    torch.manual_seed(0)
    net = Conv4(3, 4, 1, 16)
    x, y = torch.randn(6, 1, 16, 16), torch.arange(6) % 3
    cost = adaptation_cost(net, MAML(steps=1, rate=0.1, norms="frozen").learner(net).eval(), (x, y))
    weights = sum(p.numel() for n, p in net.named_parameters())
    graph = capture(net.eval(), torch.zeros(1, 1, 16, 16))
    assert graph.values["blocks.0.0"].bytes + 4 * weights < cost.board < cost.forward + 4 * weights


def test_macs_of_a_net_with_grouped_convolutions_are_those_of_the_plan():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    learner = MAML(steps=2, rate=0.1).learner(net).eval()
    cost = adaptation_cost(net, learner, (torch.randn(4, 3, 8, 8), torch.arange(4) % 3))
    assert cost.measured_macs == cost.macs == cost.measured_streamed_macs


def test_on_a_board_samples_pass_twice_where_attention_chooses():
    x, y = torch.randn(6, 1, 16, 16), torch.arange(6) % 3
    costs = {}
    for channels in ("both", "none"):
        torch.manual_seed(0)
        net = Conv4(3, 4, 1, 16)
        rule = PMeta(steps=2, rate=0.1, norms="frozen", channels=channels, rho=1.0)
        costs[channels] = adaptation_cost(net, rule.learner(net).eval(), (x, y))
    plain, twice = costs["none"], costs["both"]
    assert plain.board_macs == plain.macs < 1.5 * plain.macs < twice.board_macs
    assert twice.board_macs <= 2 * twice.macs


def test_moments_of_parts_are_those_of_the_whole():
    torch.manual_seed(0)
    x = 100 + torch.randn(9, 4, 5, 3)
    moments = _Moments()
    for part in (x[:1], x[1:4], x[4:]):
        moments.add(part)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert moments.count == 9 * 15
    assert torch.allclose(moments.mean, mean, rtol=1e-6)
    assert torch.allclose(moments.variance, variance, rtol=1e-4)


def test_max_pooling_alone_takes_no_codes():
    """A frozen pool holds its output and the positions that PyTorch makes of it, no more."""
    net, made = planned(RULES["anil"])
    tuned = apply(net, made).train()
    x = torch.randn(4, 1, 16, 16)
    with LiveBytes() as live:
        tuned(x)
    image = 4 * 8 * 16 * 16 * 4
    assert live.peak < 2.2 * image
