"""apply: an ordinary nn.Module with any loop, loss and optimiser; the model is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, NETS, Case, build
from torch import nn

import modicum as mo
from modicum.apply import Tuned

SOME = [c for c in CASES if c.note or isinstance(c.method, mo.Full)]


def row(id_: str) -> Case:
    return next(c for c in CASES if c.id == id_)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_the_outputs_are_those_of_the_model(case):
    built = build(case)
    x, _ = built.samples(3)
    want = built.model(x).detach()
    got = Tuned(built.model, built.plan).eval()(x).detach()
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_its_parameters_are_the_trained_slices_and_nothing_else(case):
    built = build(case)
    tuned = Tuned(built.model, built.plan)
    shapes = {name: tuple(p.shape) for name, p in tuned.trained.items()}
    params = dict(built.model.named_parameters())
    assert shapes == {
        u.param: u.slice.shape(tuple(params[u.param].shape)) for u in built.plan.selection.updates
    }
    assert [p.data_ptr() for p in tuned.parameters()] == [
        p.data_ptr() for p in tuned.trained.values()
    ]
    assert sum(p.numel() for p in tuned.parameters()) == built.plan.cost.trained_params


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, nesterov=True, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.005),
        lambda p: torch.optim.Adagrad(p, 0.05),
    ],
    ids=["SGD", "AdamW", "RMSprop", "Adagrad"],
)
@pytest.mark.parametrize("id_", ["mobile-slices-Momentum", "conv-Full-SGD"])
def test_any_optimiser_and_loss_train_it(id_, make):
    built = build(row(id_))
    tuned = mo.apply(built.model, built.plan)
    x, y = built.samples(8)
    optimizer = make(tuned.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.multi_margin_loss(tuned(x), y) + 1e-3 * tuned(x).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    assert closure().item() < 0.8 * first


def test_training_leaves_the_model_alone_until_it_is_written_back():
    built = build(row("mobile-slices-Momentum"))
    model = copy.deepcopy(built.model)
    tuned = mo.apply(model, built.plan)
    for p in tuned.parameters():
        p.data += 1.0
    for name, value in model.state_dict().items():
        assert torch.equal(value, built.model.state_dict()[name]), name
    x, _ = built.samples(2)
    tuned.write_to(model)
    assert torch.allclose(model(x), tuned(x), rtol=1e-4, atol=1e-4)
    slices = {u.param: u.slice for u in built.plan.selection.updates}
    for name, value in model.state_dict().items():
        change = (value - built.model.state_dict()[name]) if value.is_floating_point() else None
        if name not in slices:
            assert change is None or not change.any(), name
            continue
        mask = torch.zeros_like(value)
        rows = torch.arange(value.shape[0]) if slices[name].out is None else list(slices[name].out)
        mask[rows] = 1.0
        if slices[name].inp is not None:
            others = [i for i in range(value.shape[1]) if i not in slices[name].inp]
            mask[:, others] = 0.0
        assert torch.allclose(change, mask, atol=1e-6), name


def test_learned_parameters_are_whole_and_equal_to_what_is_written_back():
    built = build(row("groups-slices-Adam-x3"))
    tuned = mo.apply(built.model, built.plan)
    for p in tuned.parameters():
        p.data *= 2.0
    model = copy.deepcopy(built.model)
    tuned.write_to(model)
    params = dict(model.named_parameters())
    learned = tuned.learned()
    assert learned.keys() == tuned.trained.keys()
    for name, value in learned.items():
        assert torch.equal(value, params[name])


@pytest.mark.parametrize("id_", ["mlp-Full-SGD", "norms-Full-SGD", "conv-Bias1-SGD"])
def test_train_and_eval_mode_are_the_same(id_):
    built = build(row(id_))
    tuned = mo.apply(built.model, built.plan)
    x, _ = built.samples(4)
    want = tuned.eval()(x)
    buffers = {k: v.clone() for k, v in tuned.named_buffers()}
    assert torch.equal(tuned.train()(x), want)
    for name, value in tuned.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_a_state_dict_goes_into_another_of_the_same_plan():
    built = build(row("mobile-slices-Momentum"))
    a, b = (mo.apply(built.model, built.plan) for _ in range(2))
    for p in a.parameters():
        p.data += 0.5
    x, _ = built.samples(2)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_it_can_be_copied_and_used_inside_another_module():
    built = build(row("mobile-Full-SGD"))
    tuned = mo.apply(built.model, built.plan)
    outer = nn.Sequential(tuned, nn.Linear(4, 2))
    x, _ = built.samples(2)
    outer(x).sum().backward()
    assert all(p.grad is not None for p in outer.parameters())
    assert torch.equal(copy.deepcopy(tuned)(x), tuned(x))


def test_the_gradient_of_the_gradient_is_refused_rather_than_wrong():
    built = build(row("mlp-Full-SGD"))
    tuned = mo.apply(built.model, built.plan)
    x, _ = built.samples(2)
    (g, *_) = torch.autograd.grad(
        tuned(x).square().sum(), list(tuned.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
        g.sum().backward()


def test_another_model_is_refused():
    built = build(row("mlp-Full-SGD"))
    with pytest.raises(mo.InvalidInput, match="does not belong to this graph"):
        mo.apply(NETS["regression"].make(), built.plan)


def test_weights_that_are_not_finite_are_refused():
    model = nn.Linear(6, 3)
    plan = mo.plan(mo.capture(model, torch.zeros(1, 6)))
    with torch.no_grad():
        model.bias[0] = torch.inf
    with pytest.raises(mo.InvalidInput, match="'bias' has values that are not finite"):
        mo.apply(model, plan)


@pytest.mark.parametrize("param", ["plan", "nodes", "trained", "weight"])
def test_a_parameter_may_have_any_name(param):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(param, nn.Parameter(torch.ones(2, 3)))

        def forward(self, x):
            return F.linear(x, getattr(self, param))

    model = Odd()
    plan = mo.plan(mo.capture(model, torch.zeros(1, 3)),
                   method=mo.Explicit(params={"*": {"out": (1,)}}))  # fmt: skip
    tuned = mo.apply(model, plan)
    assert torch.equal(tuned(torch.ones(1, 3)), torch.full((1, 2), 3.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_on_a_gpu_as_on_the_cpu():
    built = build(row("mobile-slices-Momentum"))
    x, y = built.samples(4)
    on_cpu = mo.apply(built.model, built.plan)
    on_gpu = mo.apply(copy.deepcopy(built.model).cuda(), built.plan)
    F.cross_entropy(on_cpu(x), y).backward()
    F.cross_entropy(on_gpu(x.cuda()), y.cuda()).backward()
    for name, p in on_cpu.trained.items():
        assert torch.allclose(on_gpu.trained[name].grad.cpu(), p.grad, atol=1e-4), name
