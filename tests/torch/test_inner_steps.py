"""Step sizes by inner step in PyTorch: what moves, by how much, and what is kept for it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import STEPS, Built, Case, build, captured
from graphs import by_step, explicit, selections, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import GraphModel, cut, held_bytes, kept_bytes, run_graph, samples, total_loss
from torch import nn

import modicum as mo
from modicum.adapt import adapt
from modicum.apply import Tuned
from modicum.errors import UsageError
from modicum.fewshot import FineTune, fine_tune
from modicum.optim import SGD, Adam
from modicum.plan import Plan

rows = pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)


def by_hand(model: nn.Module, plan: Plan, x, y, updates: int) -> list[dict[str, np.ndarray]]:
    """PyTorch's own loop on the original model, in double precision: the slices after each update.

    What is not of a step's pattern has no gradient in it; what no slice holds is put back.
    """
    net, o = copy.deepcopy(model).double(), plan.optimizer
    params = dict(net.named_parameters())
    chosen = {u.param: u for u in plan.selection.updates}
    groups = [{"params": [params[name]]} for name in chosen]
    if o.kind == "adam":
        rule = torch.optim.Adam(groups, o.lr, o.betas, o.eps, o.weight_decay)
    else:
        rule = torch.optim.SGD(groups, o.lr, o.momentum, weight_decay=o.weight_decay)
    seen = []
    for k in range(updates):
        for i in range(plan.accumulate):
            at = (k * plan.accumulate + i) % len(x)
            outputs = run_graph(plan.graph, net, x[[at]].double(), plan.selection)
            (total_loss(plan.loss, outputs, y[[at]]) / plan.accumulate).backward()
        before = {name: params[name].detach().clone() for name in chosen}
        for group, (name, update) in zip(rule.param_groups, chosen.items(), strict=True):
            factor = update.rates[min(k, len(update.rates) - 1)]
            group["lr"] = o.lr * factor
            if factor == 0.0:
                params[name].grad = None
        rule.step()
        net.zero_grad()
        with torch.no_grad():
            for name, update in chosen.items():
                index = torch.arange(before[name].numel()).view(before[name].shape)
                inside = torch.zeros(before[name].numel(), dtype=torch.bool)
                inside[cut(index, update.slice).flatten()] = True
                outside = ~inside.view(before[name].shape)
                params[name][outside] = before[name][outside]
        after = {name: params[name].detach().clone() for name in chosen}
        seen.append({n: cut(after[n], u.slice).numpy() for n, u in chosen.items()})
    return seen


def agree(built: Built, plan: Plan, updates: int, within: float) -> None:
    x, y = samples(plan.graph, plan.loss, 7)
    order = [i % len(x) for i in range(updates * plan.accumulate)]
    trace = adapt(built.model, plan, (x[order], y[order]), epochs=1, record=True)
    order = [order[i] for i in trace.order]
    want = by_hand(built.model, plan, x[order], y[order], updates)
    start = dict(built.model.named_parameters())
    for k in range(updates):
        moved = plan.selection.updated_in(k)
        last = (k + 1) * plan.accumulate - 1
        for u in plan.selection.updates:
            got = trace.tensors[u.param][last]
            scale = max(float(np.abs(want[k][u.param]).max()), 1e-2)
            assert np.abs(got - want[k][u.param]).max() <= within * scale, (u.param, k)
            before = trace.tensors[u.param][last - plan.accumulate] if k else None
            if before is None:
                before = cut(start[u.param].detach(), u.slice).numpy()
            if u.param not in moved:
                assert got.tobytes() == before.tobytes(), (u.param, k)


@rows
def test_each_step_moves_what_autograd_says_and_nothing_else(case: Case):
    built = build(case)
    agree(built, built.plan, built.plan.inner_steps + 2, 1e-4)


@settings(max_examples=25)
@given(st.data())
def test_random_step_sizes_move_what_autograd_says(data):
    selection = data.draw(by_step(data.draw(selections(small_cnn()))))
    graph = small_cnn()
    rule = data.draw(st.sampled_from([SGD(lr=0.02), SGD(lr=0.02, momentum=0.9), Adam(lr=0.005)]))
    plan = mo.plan(
        graph, None, explicit(selection), rule, accumulate=data.draw(st.sampled_from([1, 2]))
    )
    model = GraphModel(graph)
    x, y = samples(graph, plan.loss, 5)
    want = by_hand(model, plan, x, y, plan.inner_steps + 1)
    tuned = Tuned(model, plan)
    got = by_the_inner_step(tuned, x, y, plan.inner_steps + 1)
    for k, step in enumerate(want):
        for name, value in step.items():
            scale = max(float(np.abs(value).max()), 1e-2)
            assert np.abs(got[k][name] - value).max() <= 1e-3 * scale, (name, k)


def by_the_inner_step(tuned: Tuned, x, y, updates: int) -> list[dict[str, np.ndarray]]:
    """A loop of one's own: `inner_step` is set, and the rates are the loop's."""
    plan, o = tuned.plan, tuned.plan.optimizer
    rates = {u.param: u for u in plan.selection.updates}
    groups = [{"params": [p], "name": name} for name, p in tuned.trained.items()]
    if o.kind == "adam":
        rule = torch.optim.Adam(groups, o.lr, o.betas, o.eps)
    else:
        rule = torch.optim.SGD(groups, o.lr, o.momentum)
    tuned.train()
    seen = []
    for k in range(updates):
        tuned.inner_step = k
        for i in range(plan.accumulate):
            at = (k * plan.accumulate + i) % len(x)
            loss = total_loss(plan.loss, tuned(x[[at]]), y[[at]]) / plan.accumulate
            loss.backward()
        moved = {name for name, p in tuned.trained.items() if p.grad is not None}
        assert moved == plan.selection.updated_in(k)
        for group in rule.param_groups:
            group["lr"] = o.lr * rates[group["name"]].rate(k)
        rule.step()
        rule.zero_grad()
        seen.append({n: p.detach().numpy().copy() for n, p in tuned.trained.items()})
    return seen


# ---- what is kept ----------------------------------------------------------------------------


@rows
def test_autograd_holds_in_each_step_the_bytes_of_its_pattern(case: Case):
    built = build(case)
    plan, tuned = built.plan, Tuned(built.model, built.plan)
    x, _ = built.samples(1)
    for step in (*range(plan.inner_steps), plan.inner_steps + 3):
        tuned.inner_step = step
        held, row = held_bytes(tuned, x), plan.steps[min(step, plan.inner_steps - 1)]
        assert held == kept_bytes(plan, step), step
        if not plan.selection.batch_norms:  # statistics may follow where nothing is trained
            assert held == row.saved
    same = len({s.saved for s in plan.steps}) == 1
    assert same == (case.note == "rates by step")


@rows
def test_what_is_kept_has_pytorchs_own_order_of_memory(case: Case):
    """Frozen layers pass channels last, which PyTorch's backward passes do not all get right."""
    built = build(case)
    tuned, kept = Tuned(built.model, built.plan), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for tuned.inner_step in range(built.plan.inner_steps):
            tuned(built.samples(2)[0])
    assert kept and all(t.is_contiguous() for t in kept)


@rows
def test_the_outputs_do_not_depend_on_the_inner_step(case: Case):
    built = build(case)
    tuned = Tuned(built.model, built.plan).eval()
    x, _ = built.samples(3)
    outputs = []
    for step in range(built.plan.inner_steps):
        tuned.inner_step = step
        with torch.no_grad():
            outputs.append(tuned(x))
    for other in outputs[1:]:
        assert torch.allclose(other, outputs[0], rtol=1e-5, atol=1e-5)


def test_a_backward_pass_belongs_to_the_step_of_its_forward_pass():
    built = build(STEPS[1])
    tuned = Tuned(built.model, built.plan)
    x, y = built.samples(2)
    tuned.inner_step = 2
    loss = total_loss("cross_entropy", tuned(x), y)
    tuned.inner_step = 1
    loss.backward()
    moved = {name for name, p in tuned.trained.items() if p.grad is not None}
    assert moved == built.plan.selection.updated_in(2) != built.plan.selection.updated_in(1)


def test_an_inner_step_below_zero_is_refused():
    tuned = Tuned(build(STEPS[1]).model, build(STEPS[1]).plan)
    tuned.inner_step = -1
    with pytest.raises(UsageError, match="no inner step -1"):
        tuned(build(STEPS[1]).samples(1)[0])


def test_adapting_counts_the_updates_and_a_rest_of_samples_makes_none():
    built = build(next(c for c in STEPS if c.accumulate == 3))
    x, y = built.samples(8)
    from modicum.adapt import passes_of_samples, train_passes

    tuned = mo.apply(built.model, built.plan)
    train_passes(tuned, passes_of_samples(built.plan, (x, y), epochs=1))
    assert tuned.inner_step == 2


def test_a_learning_rate_schedule_multiplies_the_step_sizes():
    model, graph = captured("mlp")
    method = mo.Explicit(params={"5.*": {"rates": (1.0, 0.5, 2.0)}})
    plan = mo.plan(graph, None, method, SGD(lr=0.1))
    x, y = samples(graph, plan.loss, 1)
    data = (x.repeat(4, 1), y.repeat(4))
    seen = adapt(model, plan, data, epochs=1, schedule="cosine", record=True).tensors["5.weight"]
    constant = adapt(model, plan, data, epochs=1, record=True).tensors["5.weight"]
    assert np.array_equal(seen[0], constant[0])
    start = dict(model.named_parameters())["5.weight"].detach().numpy()
    assert np.abs(seen[1] - seen[0]).max() < 0.6 * np.abs(constant[0] - start).max()
    assert not np.array_equal(seen[1], constant[1])


# ---- few-shot --------------------------------------------------------------------------------


@pytest.mark.parametrize("prototypes", ["moving", "refreshed"])
def test_a_task_is_learned_by_inner_steps_though_the_support_set_passes_frozen_layers_once(
    prototypes,
):
    """What is frozen in one step may be trained in another: it is not passed once only."""
    model, graph = captured("few shot")
    turns = {"*.0.weight": {"rates": (0.0, 1.0, 0.0)}, "*.5.weight": {"rates": (1.0, 0.0, 1.0)}}
    plan = mo.plan(graph, None, mo.Explicit(params=turns), SGD(lr=0.05))
    x, _ = samples(graph, plan.loss, 8)
    task = (x.numpy(), np.arange(8) % 4)
    tune = FineTune(iterations=3, prototypes=prototypes, probability=0.0)
    tuned, learned = fine_tune(model, plan, task, tune)
    assert tuned.inner_step == 3
    # by hand: without the prefix, all layers at each step
    mine = Tuned(model, plan)
    support, labels = torch.from_numpy(task[0]), torch.from_numpy(task[1])
    for k in range(3):
        mine.inner_step = k
        mine.refresh(support, labels)
        if prototypes == "moving":
            from modicum.heads import class_means, cosine

            features = mine.features(torch.cat([support, support]))
            _, scale, bias = mine.head()
            logits = cosine(features[8:], class_means(features[:8], labels, 4), scale, bias)
        else:
            logits = mine(support)
        loss = nn.functional.cross_entropy(logits, labels)
        assert loss.item() == pytest.approx(learned.losses[k], rel=1e-5)
        loss.backward()
        for p in mine.trained.values():
            if p.grad is not None:
                p.data -= 0.05 * p.grad
                p.grad = None
    for name, p in mine.trained.items():
        assert torch.allclose(p, tuned.trained[name], rtol=1e-4, atol=1e-6), name
    start = Tuned(model, plan)
    assert all(not torch.equal(p, start.trained[n]) for n, p in tuned.trained.items())
