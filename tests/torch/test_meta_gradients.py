"""The gradients that meta-training takes its time for: of batch norms, and of inner steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modicum.errors import UsageError
from modicum.meta import MAML, PMeta, Sines
from modicum.meta.batch_norm import batch_norm
from modicum.meta.inner import gradient_steps
from modicum.meta.pmeta import PMetaLearner
from modicum.models import Conv4

EPS = 1e-3
shapes = st.tuples(
    st.integers(2, 4), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3).map(tuple)
).map(lambda parts: (*parts[:2], *parts[2]))


def inputs(shape: tuple[int, ...], channels_last: bool = False, still: str = ""):
    """(x, weight, bias) in float64, of which those named in `still` have no gradient."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    made = {"x": x, "w": torch.randn(shape[1]).double(), "b": torch.randn(shape[1]).double()}
    return tuple(t.requires_grad_(name not in still) for name, t in made.items())


@settings(max_examples=20, deadline=None)
@given(shapes, st.booleans(), st.sampled_from(["", "x", "w", "b", "wb"]))
def test_a_batch_norm_has_the_derivatives_of_finite_differences(shape, channels_last, still):
    given_ = inputs(shape, channels_last, still)
    assert torch.autograd.gradcheck(lambda *a: batch_norm(*a, EPS), given_)
    assert torch.autograd.gradgradcheck(lambda *a: batch_norm(*a, EPS), given_)


def test_a_batch_norm_with_a_weight_of_zero_has_them_too():
    x, w, b = inputs((3, 2, 2, 2))
    w.data[0] = 0
    assert torch.autograd.gradgradcheck(lambda *a: batch_norm(*a, EPS), (x, w, b))


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (4, 3, 5, 6)])
def test_a_batch_norm_is_that_of_pytorch_to_the_bit(shape):
    x, w, b = inputs(shape)
    theirs = F.batch_norm(x, None, None, w, b, True, 0.0, EPS)
    ours = batch_norm(x, w, b, EPS)
    assert torch.equal(ours, theirs)
    g = torch.randn_like(ours)
    for found, right in zip(
        torch.autograd.grad(ours, (x, w, b), g), torch.autograd.grad(theirs, (x, w, b), g),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(found, right)


def test_second_derivatives_of_channels_last_are_channels_last():
    x, w, b = inputs((2, 3, 4, 5), channels_last=True)
    g = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)  # of the other layout
    (dx,) = torch.autograd.grad(batch_norm(x, w, b, EPS), x, g, create_graph=True)
    for second in torch.autograd.grad(dx, (x, g), torch.randn(2, 3, 4, 5).double()):
        assert second.is_contiguous(memory_format=torch.channels_last)


def test_the_outer_gradient_does_not_depend_on_the_way_that_norms_are_differentiated(monkeypatch):
    torch.manual_seed(0)
    net = Conv4(3, 4, 1, 16).double()
    drawn = [torch.randn(1, 3, 1, 16, 16), torch.arange(3)[None]]
    drawn = [d.double() if d.is_floating_point() else d for d in (*drawn, *drawn)]
    found = []
    for _ in range(2):
        learner = MAML(steps=3).learner(net).train()
        learner(*drawn)[0].backward()
        found.append([p.grad for p in learner.parameters()])
        monkeypatch.setattr(
            "modicum.meta.norms.batch_norm",
            lambda x, w, b, eps: F.batch_norm(x, None, None, w, b, True, 0.0, eps),
        )
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_a_parameter_that_the_loss_does_not_know_stays():
    net = nn.ModuleDict({"used": nn.Linear(1, 1), "idle": nn.Linear(1, 1)})
    net.forward = lambda x: net["used"](x)  # type: ignore[method-assign]
    params = dict(net.named_parameters())
    xs, ys = (torch.from_numpy(a) for a in Sines().draw(0, 0)[:2])
    (last,) = gradient_steps(net, params, set(params), (xs, ys), 1, lambda n, k: 0.1, True)
    assert torch.equal(last["idle.weight"], params["idle.weight"])
    assert not torch.equal(last["used.weight"], params["used.weight"])


@pytest.mark.parametrize("way", ["graph", "no graph", "another tensor"])
def test_a_net_that_changes_its_buffers_is_refused_in_training_and_when_judged(way):
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x):
            y = super().forward(x)
            if way == "graph":
                self.mean += y.mean(0)
            elif way == "no graph":
                with torch.no_grad():
                    self.mean.lerp_(y.mean(0), 0.1)
            else:
                self.mean = y.mean(0)
            return y

    drawn = [torch.from_numpy(a)[None] for a in Sines().draw(0, 0)]
    for learner in (MAML(steps=1).learner(Odd()).train(), MAML(steps=1).learner(Odd()).eval()):
        with pytest.raises(UsageError, match="cannot be made a function") as error:
            learner(*drawn)
        assert "mean" in str(error.value.details)


def test_steps_without_a_graph_around_them_are_those_with_one():
    net, drawn = Conv4(3, 4, 1, 16), (torch.randn(3, 1, 16, 16), torch.arange(3))
    learner = MAML(steps=2).learner(net).train()
    with_graph = learner.adapt(*drawn, 2)[-1]
    with torch.no_grad():
        without = learner.adapt(*drawn, 2)[-1]
    for name, w in with_graph.items():
        assert w.requires_grad and not without[name].requires_grad
        assert torch.equal(w, without[name]), name


def differing(norms: str) -> PMetaLearner:
    """p-Meta that updates the first layer alone, and then the others: none of them twice."""
    torch.manual_seed(0)
    learner = PMeta(steps=2, rate=0.05, norms=norms, channels="none").learner(Conv4(3, 4, 1, 16))
    learner.allowed[1:, 0] = False
    learner.allowed[0, 1] = False
    return learner.double()


def a_task() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x, y = torch.randn(2, 6, 1, 16, 16, dtype=torch.float64), torch.arange(6) % 3
    return x[0], y, x[1], y


@pytest.mark.parametrize("norms", ["batch", "per-step", "frozen"])
def test_a_step_is_the_same_whether_or_not_it_is_differentiated(norms):
    """The gradient by a layer that was left alone does not go through what was computed of it."""
    learner, (x, y, _, _) = differing(norms), a_task()
    through = learner.train().adapt(x, y, 2)[-1]
    with torch.no_grad():
        plain = learner.eval().adapt(x, y, 2)[-1]
    for name, w in plain.items():
        assert torch.allclose(through[name], w, atol=1e-12), name


@pytest.mark.parametrize("norms", ["batch", "frozen"])
def test_the_outer_gradient_is_a_finite_difference_where_steps_update_other_layers(norms):
    learner, task = differing(norms).train(), a_task()
    loss, _ = learner.task(*task)
    loss.backward()
    for name in ("blocks.0.0.weight", "blocks.2.0.weight", "head.weight"):
        w = dict(learner.net.named_parameters())[name]
        at = tuple(0 for _ in w.shape)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                w[at] += step
                values.append(float(learner.eval().task(*task)[0]))
                w[at] -= step
        learner.train()
        expected = (values[0] - values[1]) / 2e-5
        assert float(w.grad[at]) == pytest.approx(expected, rel=1e-4, abs=1e-8), name
