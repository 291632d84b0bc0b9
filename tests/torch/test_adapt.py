"""adapt: the loop that trains as PyTorch's own would, and checks its samples first."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from cases import CASES, Built, Case, build
from oracle import cut, run_graph, total_loss
from torch import nn

import modicum as mo
from modicum.adapt import rate_factor
from modicum.errors import UsageError
from modicum.optim import SGD
from modicum.tasks import Augment, Position, Preprocess, Stream, arrays, load


def row(id_: str) -> Case:
    return next(c for c in CASES if c.id == id_)


ROWS = [c for c in CASES if c.accumulate > 1 or c.optimizer != SGD(lr=0.05)]


def by_hand(built: Built, order: list[int], x, y) -> tuple[list[float], dict[str, list]]:
    """PyTorch's loop on the original model; what no slice holds is put back after each step."""
    net = copy.deepcopy(built.model)
    params = dict(net.named_parameters())
    selection = built.plan.selection
    special = selection.batch_norms or selection.sign  # which `net` itself does not do
    slices = {u.param: u.slice for u in selection.updates}
    o = built.plan.optimizer
    chosen = [params[name] for name in slices]
    if o.kind == "adam":
        optimizer = torch.optim.Adam(chosen, o.lr, o.betas, o.eps, o.weight_decay)
    else:
        optimizer = torch.optim.SGD(chosen, o.lr, o.momentum, weight_decay=o.weight_decay)
    losses, tensors = [], {name: [] for name in slices}
    for i, sample in enumerate(order):
        image = x[[sample]]
        outputs = run_graph(built.graph, net, image, selection) if special else net(image)
        loss = total_loss(built.plan.loss, outputs, y[[sample]])
        losses.append(loss.item())
        (loss / built.plan.accumulate).backward()
        if (i + 1) % built.plan.accumulate == 0:
            before = {name: params[name].detach().clone() for name in slices}
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, s in slices.items():
                    kept = torch.ones_like(before[name], dtype=torch.bool)
                    rows = list(range(len(kept))) if s.out is None else list(s.out)
                    for r in rows:
                        kept[r, ... if s.inp is None else list(s.inp)] = False
                    params[name][kept] = before[name][kept]
        for name, s in slices.items():
            tensors[name].append(cut(params[name].detach(), s).clone())
    return losses, tensors


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_it_takes_the_steps_of_pytorchs_own_loop(case):
    built = build(case)
    x, y = built.samples(5)
    trace = mo.adapt(built.model, built.plan, (x, y), epochs=2, record=True)
    losses, tensors = by_hand(built, trace.order, x, y)
    assert trace.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    for name, steps in tensors.items():
        for i, want in enumerate(steps):
            assert np.allclose(trace.tensors[name][i], want.numpy(), rtol=1e-3, atol=2e-4), (
                name,
                i,
            )


def test_each_epoch_visits_every_sample_once_in_an_order_of_the_seed():
    built = build(row("mlp-Full-SGD"))
    data = built.samples(6)
    a = mo.adapt(built.model, built.plan, data, epochs=3, seed=1)
    assert [sorted(a.order[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert a.order[:6] != a.order[6:12]
    again = mo.adapt(built.model, built.plan, data, epochs=3, seed=1)
    assert (again.order, again.losses) == (a.order, a.losses)
    assert mo.adapt(built.model, built.plan, data, epochs=3, seed=2).order != a.order


def test_an_update_follows_every_so_many_samples_and_none_an_incomplete_group():
    built = build(row("conv-Full-SGD-x3"))
    trace = mo.adapt(built.model, built.plan, built.samples(7), epochs=1, record=True)
    weights = [trace.tensors["0.weight"][i] for i in range(7)]
    same = [np.array_equal(weights[i], weights[i + 1]) for i in range(6)]
    assert same == [True, False, True, True, False, True]


@pytest.mark.parametrize("micro", [2, 3, 50])
def test_micro_batches_change_memory_and_not_what_is_learned(micro):
    built = build(row("conv-Full-SGD-x3"))
    data = built.samples(7)
    a = mo.adapt(built.model, built.plan, data, epochs=2)
    b = mo.adapt(built.model, built.plan, data, epochs=2, micro_batch=micro)
    assert b.losses == pytest.approx(a.losses, rel=1e-4, abs=1e-5)
    for name, value in a.state.items():
        assert np.allclose(value, b.state[name], atol=1e-5), name


def test_the_model_is_left_alone_and_the_trace_has_what_was_learned():
    built = build(row("mobile-slices-Momentum"))
    before = {k: v.clone() for k, v in built.model.state_dict().items()}
    trace = mo.adapt(built.model, built.plan, built.samples(4), epochs=1, record=True)
    for name, value in built.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trace.state.keys() == {u.param for u in built.plan.selection.updates}
    for u in built.plan.selection.updates:
        whole = trace.state[u.param]
        assert whole.shape == tuple(before[u.param].shape)
        assert np.array_equal(cut(torch.tensor(whole), u.slice), trace.tensors[u.param][-1])


def test_the_trace_says_where_which_plan_and_how_accuracy_changed():
    built = build(row("mlp-Full-Momentum"))
    x, y = built.samples(12)
    trace = mo.adapt(built.model, built.plan, (x, y), epochs=30, test=(x, y), seed=5)
    assert (trace.where, trace.plan_hash, trace.seed) == ("torch", built.plan.hash, 5)
    assert trace.accuracy_before == float((trace.logits_before.argmax(1) == y.numpy()).mean())
    assert trace.accuracy_after == float((trace.logits_after.argmax(1) == y.numpy()).mean())
    assert trace.accuracy_after > trace.accuracy_before
    assert np.allclose(trace.logits_before, built.model(x).detach().numpy(), atol=1e-5)
    assert trace.figures["seconds"] > 0


def test_regression_has_no_accuracy():
    built = build(row("regression-Full-SGD"))
    data = built.samples(3)
    trace = mo.adapt(built.model, built.plan, data, epochs=1, test=data)
    assert trace.accuracy_before is None and trace.accuracy_after is None


def test_every_step_is_told_as_it_happens():
    built = build(row("mlp-Full-SGD"))
    seen = []
    trace = mo.adapt(
        built.model, built.plan, built.samples(3), epochs=2, on_step=lambda *s: seen.append(s)
    )
    assert seen == list(enumerate(trace.losses))


def test_progress_goes_to_stderr_and_only_when_it_is_asked_for(capfd):
    built = build(row("mlp-Full-SGD"))
    mo.adapt(built.model, built.plan, built.samples(3), epochs=1)
    assert capfd.readouterr() == ("", "")
    mo.adapt(built.model, built.plan, built.samples(3), epochs=1, progress=True)
    assert capfd.readouterr().out == ""


# ---- bad input -------------------------------------------------------------------------------


def spoiled(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[1, -1] = value
    return x


X, Y = build(row("mlp-Full-SGD")).samples(4)
BAD = {
    "not a number": (spoiled(X, math.nan), Y),
    "infinite": (spoiled(X, math.inf), Y),
    "another shape": (X[:, :5], Y),
    "another rank": (X[:, None], Y),
    "no samples": (X[:0], Y[:0]),
    "text": ([["a"] * 6] * 4, Y),
    "ragged": ([[1.0], [1.0, 2.0]], Y[:2]),
    "fewer labels": (X, Y[:3]),
    "one label": (X, 3),
    "label too large": (X, Y + 1),
    "negative label": (X, Y - 1),
    "fractional label": (X, Y + 0.5),
    "label that is no number": (X, Y * math.nan),
    "one-hot labels": (X, torch.eye(4)),
    "text labels": (X, list("abcd")),
    "nothing": (None, None),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
@pytest.mark.parametrize("as_test", [False, True], ids=["train", "test"])
def test_samples_that_do_not_fit_are_refused_before_anything_is_trained(data, as_test):
    built = build(row("mlp-Full-SGD"))
    steps = []
    train, test = ((X, Y), data) if as_test else (data, None)
    with pytest.raises(mo.InvalidInput):
        mo.adapt(built.model, built.plan, train, test=test, on_step=lambda *s: steps.append(s))
    assert steps == []


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(4, 2), torch.full((4, 3), math.nan), torch.zeros(3, 3), torch.zeros(4)],
    ids=["too few", "not a number", "another length", "another rank"],
)
def test_targets_that_do_not_fit_are_refused(targets):
    built = build(row("regression-Full-SGD"))
    x, _ = built.samples(4)
    with pytest.raises(mo.InvalidInput):
        mo.adapt(built.model, built.plan, (x, targets))


def test_a_training_that_diverges_ends_with_the_step():
    built = build(row("linear-Full-SGD"))
    plan = mo.plan(built.graph, method=mo.Full(), optimizer=SGD(lr=3e38))
    with pytest.raises(mo.InvalidInput, match=r"loss is not finite at step \d+"):
        mo.adapt(built.model, plan, built.samples(3), epochs=5)


@pytest.mark.parametrize("more", [{"epochs": -1}, {"micro_batch": 0}, {"micro_batch": -1}], ids=str)
def test_a_loop_that_cannot_be_is_a_usage_error(more):
    built = build(row("mlp-Full-SGD"))
    with pytest.raises(mo.ModicumError) as caught:
        mo.adapt(built.model, built.plan, (X, Y), **more)
    assert caught.value.exit_code == 2


def test_no_epochs_train_nothing():
    built = build(row("mlp-Full-SGD"))
    trace = mo.adapt(built.model, built.plan, (X, Y), epochs=0, record=True)
    assert trace.losses == [] and trace.order == []
    before = dict(built.model.named_parameters())
    for name, value in trace.state.items():
        assert np.array_equal(value, before[name].detach())


# ---- streams of batches ------------------------------------------------------------------------


def pictures(n: int = 12):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (n, 6, 6, 1), dtype=np.uint8)
    return load((x, np.arange(n) % 3)), Preprocess(size=6, mean=(0.5,), std=(0.5,))


def planned(accumulate: int, lr: float = 0.05) -> tuple[nn.Module, mo.Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    graph = mo.capture(model, torch.zeros(1, 1, 6, 6))
    return model, mo.plan(graph, method=mo.Full(), optimizer=SGD(lr=lr), accumulate=accumulate)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_stream_of_batches_learns_what_samples_one_by_one_do(schedule):
    dataset, shown = pictures()
    model, plan = planned(accumulate=4)
    data = arrays(dataset, shown)
    one = mo.adapt(model, plan, data, epochs=2, test=data, schedule=schedule)
    ordered = dataset.subset(one.order)
    stream = Stream(ordered, shown, 4, epochs=1, shuffle=False)
    all_ = mo.adapt(model, plan, stream, test=(dataset, shown), schedule=schedule)
    assert all_.losses == pytest.approx(one.losses, abs=1e-5)
    assert all_.logits_before == pytest.approx(one.logits_before, abs=1e-5)
    assert all_.logits_after == pytest.approx(one.logits_after, abs=1e-5)
    assert (all_.accuracy_before, all_.accuracy_after) == (one.accuracy_before, one.accuracy_after)
    for name, value in one.state.items():
        assert np.allclose(value, all_.state[name], atol=1e-5), name


def test_a_stream_takes_the_steps_of_pytorchs_own_loop():
    dataset, shown = pictures(10)
    model, plan = planned(accumulate=4)
    net = copy.deepcopy(model)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    losses = []
    for x, y in Stream(dataset, shown, 4, seed=7, epochs=3, augment=Augment()):
        each = nn.functional.cross_entropy(
            net(torch.from_numpy(x)), torch.from_numpy(y), reduction="none"
        )
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        rates.step()
        losses += each.tolist()
    stream = Stream(dataset, shown, 4, seed=7, epochs=3, augment=Augment())
    trace = mo.adapt(model, plan, stream, schedule="cosine", record=True)
    assert trace.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert (trace.seed, trace.order, len(trace.losses)) == (7, [], 30)
    for name, p in net.named_parameters():
        assert np.allclose(trace.state[name], p.detach(), atol=1e-5), name
        assert len(trace.tensors[name]) == 30
    assert 0 < trace.figures["seconds_per_step"] <= trace.figures["seconds"]


def test_a_stream_that_goes_on_is_trained_to_its_end():
    dataset, shown = pictures()
    model, plan = planned(accumulate=4)
    at = Position(epoch=1, step=2)
    trace = mo.adapt(model, plan, Stream(dataset, shown, 4, epochs=3, at=at), schedule="cosine")
    assert len(trace.losses) == 4 + 12


def test_a_cosine_ends_before_zero_and_half_way_is_half():
    factors = [rate_factor("cosine", t, 4) for t in range(4)]
    assert factors == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rate_factor("constant", 3, 4) == 1


@pytest.mark.parametrize(
    ("stream", "more"),
    [
        ({"batch": 3}, {}),
        ({"epochs": None}, {}),
        ({}, {"epochs": 2}),
        ({}, {"seed": 1}),
        ({}, {"micro_batch": 2}),
        ({}, {"schedule": "linear"}),
    ],
    ids=["other batches", "no end", "epochs", "seed", "micro-batches", "schedule"],
)
def test_a_stream_that_does_not_go_with_the_plan_is_a_usage_error(stream, more):
    dataset, shown = pictures()
    model, plan = planned(accumulate=4)
    made = Stream(dataset, shown, **{"batch": 4, "epochs": 1, **stream})
    with pytest.raises(UsageError):
        mo.adapt(model, plan, made, **more)


def test_images_of_another_size_or_class_are_refused():
    dataset, _ = pictures()
    model, plan = planned(accumulate=4)
    with pytest.raises(mo.InvalidInput, match="the inputs have shape"):
        mo.adapt(model, plan, Stream(dataset, Preprocess(size=5, mean=(0,), std=(1,)), 4, epochs=1))
    many = load((np.zeros((8, 6, 6, 1), np.uint8), np.arange(8) % 4))
    shown = Preprocess(size=6, mean=(0,), std=(1,))
    with pytest.raises(mo.InvalidInput, match="labels must be"):
        mo.adapt(model, plan, Stream(many, shown, 4, epochs=1))
    with pytest.raises(mo.InvalidInput, match="labels must be"):
        mo.adapt(model, plan, Stream(dataset, shown, 4, epochs=1), test=(many, shown))
