"""Inner and outer rules: their gradients, what they move, what norms do, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from modicum.errors import InvalidInput, UsageError
from modicum.meta import (
    ANIL,
    BOIL,
    MAML,
    MAMLPP,
    RULES,
    MetaTrain,
    PMeta,
    Reptile,
    Sines,
    judge,
    load_learner,
    metatrain,
)
from modicum.meta.inner import gradient_steps, output
from modicum.meta.norms import MetaNorm
from modicum.meta.reptile import mini_batch
from modicum.models import Conv4, ResNet12, SineNet
from modicum.ops.attention import clip, most_kept
from modicum.tasks import FixedEpisodes, Preprocess, load

SHOWN = Preprocess(size=6, mean=(0.5,), std=(0.5,))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(norm: bool = True) -> nn.Module:
    """Two convolutions and a head, smooth, so that finite differences are exact enough."""
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3),
              nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(4, 3)]  # fmt: skip
    keep = [m for m in layers if norm or not isinstance(m, nn.BatchNorm2d)]
    return nn.Sequential(*keep).double()


def task(n: int = 1, m: int = 3, dtype=torch.float64, tasks: int = 1, size: int = 6):
    """(t, n, ...) .. of 3 ways, n shots and m queries."""
    ys, yq = torch.arange(3).repeat(n), torch.arange(3).repeat(m)
    made = [
        (torch.randn(3 * n, 1, size, size, dtype=dtype), ys,
         torch.randn(3 * m, 1, size, size, dtype=dtype), yq)
        for _ in range(tasks)
    ]  # fmt: skip
    return tuple(torch.stack(parts) for parts in zip(*made, strict=True))


def gradients(learner, drawn) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    learner(*drawn)[0].backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        MAML(steps=3, rate=0.5),
        MAML(steps=2, rate=0.5, norms="frozen"),
        ANIL(steps=3, rate=0.5),
        BOIL(steps=2, rate=0.5),
        MAMLPP(steps=3, rate=0.5),
        PMeta(steps=2, rate=0.5, rho=0.6),
        PMeta(steps=2, rate=0.5, rho=1.0, channels="bw"),
    ],
    ids=lambda rule: f"{rule.kind} {rule.norms}",
)
def test_the_outer_gradient_is_that_of_finite_differences(rule):
    learner, drawn = rule.learner(small()).double().train(), task()
    found = gradients(learner, drawn)
    rng = np.random.default_rng(0)
    for name, p in learner.named_parameters():
        flat, g = p.data.view(-1), found[name].reshape(-1)
        for i in rng.choice(len(flat), min(3, len(flat)), replace=False):
            ends = []
            for sign in (1, -1):
                flat[i] += sign * 1e-6
                ends.append(float(learner(*drawn)[0].detach()))
                flat[i] -= sign * 1e-6
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(float(g[i]), rel=2e-4, abs=1e-7), name


def test_the_first_order_gradient_is_that_of_the_last_weights():
    net, drawn = small(), task()
    learner = MAML(steps=2, rate=0.5, order="first").learner(net).train()
    found = gradients(learner, drawn)
    with torch.no_grad():
        last = learner.adapt(drawn[0][0], drawn[1][0], 2)[-1]
    plain = MAML(steps=1, rate=1e-9, order="first").learner(net).train()
    plain.net.load_state_dict({**learner.net.state_dict(), **last})
    here = gradients(plain, drawn)
    for name, g in found.items():
        assert torch.allclose(g, here[name], atol=1e-8), name
    second = gradients(MAML(steps=2, rate=0.5).learner(net).train(), drawn)
    assert not torch.allclose(second["net.0.weight"], found["net.0.weight"])


def test_the_loss_of_mamlpp_is_taken_after_every_step_by_its_importance():
    learner, drawn = MAMLPP(steps=3, multi_step=0.5).learner(small()).double().train(), task()
    xs, ys, xq, yq = (part[0] for part in drawn)
    learner.progress = 0.2
    after = learner.adapt(xs, ys, 3)
    losses = [
        nn.functional.cross_entropy(output(learner.net, params, xq, k), yq)
        for k, params in enumerate(after, 1)
    ]
    shares = learner.importance()
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)
    want = sum(v * float(loss.detach()) for v, loss in zip(shares, losses, strict=True))
    assert float(learner(*drawn)[0].detach()) == pytest.approx(want, rel=1e-9)
    learner.progress = 0.5
    assert float(learner(*drawn)[0].detach()) == pytest.approx(float(losses[-1].detach()), rel=1e-9)


def test_mamlpp_begins_with_first_order_gradients():
    drawn, found = task(), {}
    for label, rule in {
        "early": MAMLPP(steps=2, rate=0.5, multi_step=0, first_order=0.5, norms="batch"),
        "first": MAML(steps=2, rate=0.5, order="first"),
        "second": MAML(steps=2, rate=0.5),
    }.items():
        torch.manual_seed(0)
        learner = rule.learner(small()).double().train()
        found[label] = gradients(learner, drawn)
        if label == "early":
            learner.progress = 0.5
            found["late"] = gradients(learner, drawn)
    for name, g in found["first"].items():
        assert torch.allclose(g, found["early"][name], atol=1e-10), name
        assert torch.allclose(found["second"][name], found["late"][name], atol=1e-10), name
    assert not torch.allclose(found["early"]["net.0.weight"], found["late"]["net.0.weight"])


@pytest.mark.parametrize("kind", ["maml", "anil", "boil", "maml++", "reptile", "p-meta"])
def test_tasks_at_once_are_tasks_one_after_the_other(kind):
    net, drawn = small(), task(tasks=3)
    learner = RULES[kind](steps=2, rate=0.3).learner(net).double().train()
    together = gradients(learner, drawn)
    learner.zero_grad()
    for i in range(3):
        (learner(*(part[i : i + 1] for part in drawn))[0] / 3).backward()
    for name, p in learner.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, together[name], atol=1e-9), name


def test_a_step_without_second_order_has_no_graph():
    net = small(norm=False)
    params = {n: p for n, p in net.named_parameters()}
    drawn = task()
    (last,) = gradient_steps(
        net, params, set(params), (drawn[0][0], drawn[1][0]), 1, lambda n, k: 0.1, False
    )
    grads = torch.autograd.grad(last["0.weight"].sum(), [params["0.weight"]])
    assert torch.equal(grads[0], torch.ones_like(grads[0]))  # d(w - constant)/dw


# ---- what moves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "moved"),
    [
        (MAML(steps=2), {"0", "1", "3", "4", "8"}),
        (MAMLPP(steps=2), {"0", "3", "8"}),
        (ANIL(steps=2), {"8"}),
        (BOIL(steps=2), {"0", "1", "3", "4"}),
        (PMeta(steps=2), {"0", "3", "8"}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_inner_loop_moves_what_the_rule_says(rule, moved):
    learner, drawn = rule.learner(small()).double().eval(), task()
    before = dict(learner.net.named_parameters())
    after = learner.adapt(drawn[0][0], drawn[1][0], 2)[-1]
    changed = {n.split(".")[0] for n, w in after.items() if not torch.equal(w, before[n])}
    assert changed == moved


def test_adaptation_leaves_the_learner_alone():
    for kind in ("maml", "anil", "boil", "maml++", "reptile", "p-meta"):
        learner = RULES[kind](steps=2).learner(small()).double()
        before = {k: v.clone() for k, v in learner.state_dict().items()}
        learner.eval()(*task())
        learner.train()(*task())
        for key, value in learner.state_dict().items():
            assert torch.equal(value, before[key]), (kind, key)


# ---- Reptile ---------------------------------------------------------------------------------


class Constant(nn.Module):
    """y = w, whatever x is."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), 1)


class Targets:
    """Task i asks for y = i, always."""

    def draw(self, seed, index, train=False):
        x, y = np.zeros((2, 1)), np.full((2, 1), float(index))
        return x, y, x, y

    def fingerprint(self):
        return {"targets": 1}


def test_reptile_on_a_quadratic_is_its_closed_form(tmp_path):
    """loss (w - c)^2: a step is w <- c + (1 - 2a)(w - c), so w_K = c + (1 - 2a)^K (w - c)."""
    net = Constant(5.0)
    config = MetaTrain(rule=Reptile(steps=3, rate=0.1), epochs=1, episodes=4, tasks=4, rate=0.5)
    metatrain(net, Targets(), None, config, out=tmp_path)
    ends = [c + 0.8**3 * (5.0 - c) for c in range(4)]
    assert float(net.w.detach()) == pytest.approx(5.0 + 0.5 * (np.mean(ends) - 5.0), abs=1e-12)


def test_reptile_with_a_whole_step_is_the_mean_of_what_the_tasks_end_with(tmp_path):
    net = Constant(5.0)
    config = MetaTrain(rule=Reptile(steps=2, rate=0.25), epochs=1, episodes=2, tasks=2)
    metatrain(net, Targets(), None, config, out=tmp_path)
    assert float(net.w.detach()) == pytest.approx(np.mean([0.25 * 5, 1 + 0.25 * 4]), abs=1e-12)


@given(st.integers(1, 90), st.integers(1, 20))
def test_mini_batches_of_reptile_deal_out_all_samples(n, parts):
    dealt = [mini_batch(n, parts, k) for k in range(min(parts, n))]
    assert torch.cat(dealt).sort()[0].tolist() == list(range(n))
    assert all(len(rows) >= n // parts for rows in dealt)
    assert torch.equal(mini_batch(n, parts, len(dealt)), dealt[0])


def test_reptile_sees_another_mini_batch_in_each_step():
    """loss mean (w - y)^2: a step is w <- w - 2a (w - mean of its samples)."""
    xs, xq = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    ys, yq = torch.randn(4, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    y = torch.cat([ys, yq])
    for passes, parts in ((1, 4), (2, 2), (4, 1), (9, 1)):
        rule = Reptile(steps=4, rate=0.2, passes=passes)
        learner = rule.learner(Constant(5.0)).double().train()
        learner.task(xs, ys, xq, yq)[0].backward()
        w = 5.0
        for k in range(4):
            w -= 0.4 * (w - float(y[mini_batch(9, parts, k)].mean()))
        assert float(learner.net.w.grad) == pytest.approx(5.0 - w, abs=1e-12)
    assert not torch.equal(mini_batch(9, 2, 0), mini_batch(9, 2, 1))


# ---- MAML++ --------------------------------------------------------------------------------------


def test_losses_of_all_steps_count_at_first_and_only_the_last_one_later():
    learner = MAMLPP(steps=4, multi_step=0.5).learner(small())
    seen = []
    for learner.progress in (0.0, 0.25, 0.49, 0.5, 1.0):
        shares = learner.importance()
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        seen.append(shares[-1])
    assert seen[0] == pytest.approx(0.25) and seen == sorted(seen) and seen[-2:] == [1, 1]


def test_step_sizes_are_learned_for_each_layer_and_step():
    learner = MAMLPP(steps=2, multi_step=0).learner(small()).double().train()
    found = gradients(learner, task())["rates"]
    assert found.shape == (2, 3) and bool((found != 0).all())


# ---- norms ---------------------------------------------------------------------------------------


def test_frozen_norms_judge_a_sample_as_if_it_were_alone():
    drawn = task(m=4)
    for norms, alone in (("frozen", True), ("batch", False)):
        learner = MAML(steps=2, norms=norms).learner(small()).eval()
        with torch.no_grad():
            whole = learner(*drawn)[1][0]
            one = learner(drawn[0], drawn[1], drawn[2][:, :1], drawn[3][:, :1])[1][0]
        assert torch.allclose(whole[:1], one) == alone


def test_running_statistics_follow_the_queries_after_an_update_and_nothing_else():
    learner = MAML(steps=1, norms="frozen").learner(small())
    norm = learner.net[1]
    assert isinstance(norm, MetaNorm)
    drawn = task()
    with torch.no_grad():
        y = learner.net[0](drawn[2][0])
    learner.train()(*drawn)
    assert torch.equal(norm.running_mean, torch.zeros(3, dtype=torch.float64))
    learner.after_update(*(part[-1] for part in drawn))
    assert torch.allclose(norm.running_mean, 0.1 * y.mean((0, 2, 3)))


def test_per_step_norms_have_a_scale_for_each_step_and_give_the_first_to_the_net():
    net = small()
    learner = MAMLPP(steps=2).learner(net).double()
    assert learner.net[1].weight.shape == (3, 3)
    found = gradients(learner.train(), task())
    assert bool((found["net.1.weight"] != 0).all())
    with torch.no_grad():
        learner.net[1].weight[0] += 1
    learner.write_to(net)
    assert torch.equal(net[1].weight, torch.full((3,), 2.0, dtype=torch.float64))


def test_a_norm_without_running_statistics_cannot_be_frozen():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(UsageError, match="cannot be frozen"):
        MAML(norms="frozen").learner(net)
    MAML(norms="batch").learner(net)


# ---- p-Meta ----------------------------------------------------------------------------------


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_what_is_clipped_is_the_smallest_scores_beyond_rho(values, rho):
    scores = torch.tensor(values, dtype=torch.float64).softmax(0)
    gates = clip(scores, rho)
    kept = gates > 0
    n = int(kept.sum())
    assert 1 <= n <= most_kept(len(values), rho)
    assert float(gates[kept].mean()) == pytest.approx(1)
    if n < len(values):
        assert float(scores[kept].min()) >= float(scores[~kept].max()) - 1e-15
        assert float(scores[kept].sum()) > rho - 1e-12
    order = sorted(scores[kept].tolist())
    assert sum(order[1:]) <= rho + 1e-12  # one fewer would not have been enough


def test_equal_scores_gate_nothing_and_the_most_stay():
    for channels in range(1, 40):
        for rho in (0.1, 0.25, 0.5, 0.99, 1.0):
            gates = clip(torch.full((channels,), 1 / channels, dtype=torch.float64), rho)
            n = int((gates > 0).sum())
            assert n == most_kept(channels, rho) or n == most_kept(channels, rho) - 1
            assert torch.allclose(gates[:n], torch.ones(n, dtype=torch.float64))


def pmeta(**fields) -> tuple[PMeta, nn.Module]:
    rule = PMeta(**{"steps": 3, "prune_from": 0.0, "prune_to": 0.0, **fields})
    return rule, rule.learner(Conv4(3, 4, 1, 16))


def test_norms_for_each_step_are_not_for_a_rule_that_moves_all():
    with pytest.raises(ValidationError, match="norms"):
        Reptile(norms="per-step")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("pruning", ["score", "random", "last"])
def test_the_memory_limit_holds_in_every_inner_step(share, pruning):
    _, learner = pmeta(share=share, pruning=pruning)
    drawn = task(dtype=torch.float32, size=16)
    learner.progress = 0.5
    learner.after_update(*(part[-1] for part in drawn))
    memory = learner.memory
    limit = share * memory.peak(frozenset(learner.layers))
    for k in range(3):
        assert memory.peak(learner.active(k)) <= limit
        assert learner.active(k)
    assert (learner.rates == 0).any() == (~learner.allowed).any()


@pytest.mark.parametrize("pruning", ["score", "random", "last"])
def test_a_limit_that_sinks_leaves_a_layer_that_keeps_it_in_the_end(pruning):
    """What would fit alone for a while is not kept for that."""
    _, learner = pmeta(share=0.1, pruning=pruning, steps=8, prune_to=1.0)
    for learner.progress in np.linspace(0, 1, 60).tolist():
        learner.keep_limits((1, 16, 16), 3, "cross_entropy")
    assert learner.ready
    assert all(learner.active(k) for k in range(8))


def test_weights_are_kept_of_an_epoch_that_keeps_the_limit(tmp_path):
    data = load((np.zeros((60, 16, 16), np.uint8), np.arange(60) % 5))
    shown = Preprocess(size=16, mean=(0.5,), std=(0.5,))
    episode = FixedEpisodes(ways=3, shots=1, queries=2)
    rule = PMeta(steps=2, rate=0.01, prune_from=0.5, prune_to=0.9)
    config = MetaTrain(rule=rule, epochs=4, episodes=4, tasks=2, episode=episode, validation=2)
    trace = metatrain(Conv4(3, 4, 1, 16), data, shown, config, out=tmp_path, validation=data)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry.get("ready", True) for entry in log] == [False, False, False, True]
    assert trace.best == 3
    _, learner = load_learner(Conv4(3, 4, 1, 16), tmp_path / "learner.pt")
    assert not bool(learner.allowed.all())


def patterns(n: int = 60):
    """A dataset of noise of 5 classes, and how it is shown."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16), dtype=np.uint8)
    return load((pixels, np.arange(n) % 5)), Preprocess(size=16, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(("prune_to", "updates"), [(1.0, 3), (0.6, 1), (0.6, 2)])
def test_a_training_ends_within_the_limit_however_short_it_is(tmp_path, prune_to, updates):
    data, shown = patterns()
    episode = FixedEpisodes(ways=3, shots=1, queries=2)
    rule = PMeta(steps=2, rate=0.01, share=0.05, prune_to=prune_to)
    config = MetaTrain(
        rule=rule, epochs=1, warmup=0, episodes=2 * updates, tasks=2, episode=episode,
        validation=2,
    )  # fmt: skip
    metatrain(Conv4(3, 4, 1, 16), data, shown, config, out=tmp_path, validation=data)
    _, learner = load_learner(Conv4(3, 4, 1, 16), tmp_path / "learner.pt")
    learner.keep_limits((1, 16, 16), 3, "cross_entropy")
    memory = learner.memory
    assert all(0 < memory.peak(learner.active(k)) <= learner.limit() for k in range(2))
    assert (tmp_path / "method.json").exists()


def test_the_last_entry_that_keeps_the_limit_does_not_fall_to_0():
    _, learner = pmeta(share=0.05, prune_from=0.5, prune_to=1.0, rate=0.1)
    drawn = tuple(part[-1] for part in task(dtype=torch.float32, size=16))
    learner.after_update(*drawn)
    memory, limit = learner.memory, learner.limit()
    fit = [n for n in learner.layers if memory.peak(frozenset({n})) <= limit]
    assert fit and len(fit) < len(learner.layers)
    with torch.no_grad():
        learner.alpha[[learner.layers.index(n) for n in fit], 1] = -0.01
        learner.alpha[:, 2] = 0
    learner.after_update(*drawn)
    least = torch.tensor(1e-4)
    assert torch.equal(learner.rates[learner.layers.index(fit[-1]), 1].detach(), least)
    assert learner.active(2) == {fit[-1]}
    learner.progress = 1.0
    learner.after_update(*drawn)
    assert learner.ready and learner.active(1) == {fit[-1]}


@pytest.mark.parametrize("layer", ["head", "blocks.2.0"])
def test_a_limit_that_one_layer_just_keeps_leaves_that_layer(layer):
    _, first = pmeta()
    first.keep_limits((1, 16, 16), 3, "cross_entropy")
    name = next(n for n in first.layers if n.startswith(layer) or layer in n)
    peak = first.memory.peak(frozenset({name}))
    for more in range(3):
        _, learner = pmeta(ram=peak + more, prune_from=0.2, prune_to=0.6)
        with torch.no_grad():
            learner.alpha[learner.layers.index(name)] = 10.0
        for learner.progress in (0.1, 0.3, 0.59, 0.6, 1.0):
            learner.keep_limits((1, 16, 16), 3, "cross_entropy")
        assert learner.ready and all(name in learner.active(k) for k in range(3))


def test_a_limit_that_nothing_keeps_is_an_error_at_the_start():
    _, learner = pmeta(ram=16, prune_from=0.9, prune_to=1.0)
    with pytest.raises(UsageError, match="no layer can be updated in 16 bytes"):
        learner.after_update(*(part[-1] for part in task(dtype=torch.float32, size=16)))


def test_step_sizes_are_never_negative_and_stay_at_0():
    _, learner = pmeta(share=1.0)
    drawn = task(dtype=torch.float32, size=16)
    with torch.no_grad():
        learner.alpha[0, 1] = -0.2
    assert bool((learner.rates >= 0).all())
    learner.after_update(*(part[-1] for part in drawn))
    assert not bool(learner.allowed[0, 1]) and float(learner.rates[0, 1].detach()) == 0
    with torch.no_grad():
        learner.alpha[0, 1] = 1.0
    assert float(learner.rates[0, 1].detach()) == 0
    before = dict(learner.net.named_parameters())
    after = learner.eval().adapt(drawn[0][0], drawn[1][0], 2)
    assert torch.equal(after[1]["blocks.0.0.weight"], after[0]["blocks.0.0.weight"])
    assert not torch.equal(after[0]["blocks.0.0.weight"], before["blocks.0.0.weight"])


def test_the_masked_gradient_is_the_dense_one_times_the_gates():
    _, learner = pmeta(share=1.0, rho=0.4, rate=0.5)
    _, dense = pmeta(share=1.0, channels="none", rate=0.5)
    dense.net.load_state_dict(learner.net.state_dict())
    drawn = task(dtype=torch.float32, size=16)
    learner.eval(), dense.eval()
    before = dict(learner.net.named_parameters())
    masked = learner.adapt(drawn[0][0], drawn[1][0], 1)[0]
    whole = dense.adapt(drawn[0][0], drawn[1][0], 1)[0]
    name = "blocks.2.0.weight"
    g = (before[name] - whole[name]) / 0.5
    gated = (before[name] - masked[name]) / 0.5
    rows, columns = (gated.abs().amax(d) > 0 for d in ((1, 2, 3), (0, 2, 3)))
    assert 0 < rows.sum() < 4 and 0 < columns.sum() < 4
    gates = gated.flatten(2).sum(2) / g.flatten(2).sum(2)
    outer = gates.amax(1, keepdim=True) * gates.amax(0) / gates.amax()
    assert torch.allclose(gates, outer, atol=1e-3)  # gamma^bw x gamma^fw


def test_both_branches_receive_gradient():
    _, learner = pmeta(share=1.0)
    found = gradients(learner.train(), task(dtype=torch.float32, size=16))
    for name, g in found.items():
        if "attention" in name and "up.weight" in name:
            assert float(g.abs().sum()) > 0, name
    sides = {name.split(".")[2] for name in found if name.startswith("attention")}
    assert sides == {"fw", "bw"}


def test_what_the_branches_have_learned_matters(tmp_path):
    """With the scores of their channels shuffled the same net learns sines worse."""
    net = SineNet()
    rule = PMeta(steps=5, rate=0.01, share=1.0)
    config = MetaTrain(rule=rule, epochs=2, episodes=2500, tasks=25, together=25, rate=2e-3)
    metatrain(net, Sines(), None, config, out=tmp_path)
    _, learner = load_learner(net, tmp_path / "learner.pt")
    error = np.mean(judge(learner, Sines(queries=50), 100))
    kept = {name: value.clone() for name, value in learner.state_dict().items()}
    for seed in range(3):
        learner.load_state_dict(kept)
        drawn = torch.Generator().manual_seed(seed)
        for branch in (b for a in learner.attention.values() for b in (a.fw, a.bw) if b):
            order = torch.randperm(len(branch.up.bias), generator=drawn)
            with torch.no_grad():
                branch.up.weight.copy_(branch.up.weight[order])
                branch.up.bias.copy_(branch.up.bias[order])
        assert np.mean(judge(learner, Sines(queries=50), 100)) > 1.1 * error


# ---- learning, files, bad input ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["maml", "maml++", "reptile", "p-meta"])
def test_sines_are_learned(kind, tmp_path):
    fields = {"p-meta": {"share": 0.9}, "reptile": {"steps": 5, "rate": 0.02, "judged": 5}}.get(
        kind, {}
    )
    rule = RULES[kind](**{"steps": 1, "rate": 0.01, **fields})
    rate = 1.0 if kind == "reptile" else 5e-3
    config = MetaTrain(rule=rule, epochs=2, episodes=400, tasks=8, together=8, rate=rate)
    net = SineNet()
    before = np.mean(judge(rule.learner(SineNet()), Sines(), 100))
    trace = metatrain(net, Sines(), None, config, out=tmp_path, test=Sines(), test_tasks=100)
    assert trace.test is not None and not trace.test.labels
    assert trace.test.mean < 0.9 * before
    assert trace.losses[-1] < trace.losses[0] and trace.accuracies == ()


def test_a_learner_comes_back_from_its_file(tmp_path):
    config = MetaTrain(rule=PMeta(steps=2, rate=0.01), epochs=1, episodes=40)
    net = SineNet()
    trace = metatrain(net, Sines(), None, config, out=tmp_path, test=Sines(), test_tasks=20)
    rule, learner = load_learner(SineNet(), tmp_path / "learner.pt")
    assert rule == config.rule
    assert np.mean(judge(learner, Sines(), 20)) == pytest.approx(trace.test.mean)


def test_the_file_of_another_model_or_rule_is_refused(tmp_path):
    config = MetaTrain(rule=MAML(steps=1, rate=0.01), epochs=1, episodes=4)
    metatrain(SineNet(), Sines(), None, config, out=tmp_path)
    with pytest.raises(InvalidInput, match="of another rule or model"):
        load_learner(SineNet(hidden=7), tmp_path / "learner.pt")
    with pytest.raises(InvalidInput, match="of another rule or model"):
        load_learner(SineNet(), tmp_path / "weights.pt")
    (tmp_path / "odd.pt").write_bytes(b"odd")
    with pytest.raises(InvalidInput, match="cannot read"):
        load_learner(SineNet(), tmp_path / "odd.pt")
    other = MetaTrain(rule=ANIL(steps=1, rate=0.01), epochs=1, episodes=4)
    with pytest.raises(InvalidInput, match="another training"):
        metatrain(SineNet(), Sines(), None, other, out=tmp_path)


class Counts(nn.Module):
    """Counts in a buffer what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        y = self.layer(x)
        self.seen += y.sum(0)
        return y


def test_a_module_that_changes_its_buffers_is_refused_with_its_name():
    learner = MAML(steps=1).learner(Counts()).train()
    drawn = [torch.from_numpy(a)[None] for a in Sines().draw(0, 0)]
    with pytest.raises(UsageError, match="cannot be made a function") as error:
        learner(*drawn)
    assert "Counts" in str(error.value.details)


def test_a_net_without_a_head_or_with_too_few_outputs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no linear layer"):
        ANIL().learner(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()))
    data = load((np.zeros((150, 6, 6), np.uint8), np.arange(150) % 5))
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(UsageError, match="2 outputs, and tasks have 5 ways"):
        metatrain(net, data, SHOWN, MetaTrain(rule=MAML(), epochs=1, episodes=4), out=tmp_path)
    with pytest.raises(UsageError, match="cosine head"):
        metatrain(net, data, SHOWN, MetaTrain(epochs=6, episodes=4), out=tmp_path)
    few, short = data.subset(data.labels < 3), MetaTrain(rule=MAML(), epochs=1, episodes=4)
    with pytest.raises(InvalidInput, match="a task of 5 ways"):
        metatrain(net, few, SHOWN, short, out=tmp_path)
    many = short.model_copy(update={"episode": FixedEpisodes(ways=5, shots=50)})
    with pytest.raises(InvalidInput, match="images"):
        metatrain(net, data, SHOWN, many, out=tmp_path)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_a_sine_task_is_a_pure_function_of_its_numbers(index):
    a, b = Sines().draw(3, index), Sines().draw(3, index)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[0].shape == (10, 1) and a[1].dtype == np.float32
    assert np.abs(a[1]).max() <= 5 and not np.array_equal(a[0], Sines().draw(4, index)[0])


def test_resnet12_has_four_stages_and_passes_images():
    net = ResNet12(5, width=0.1)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert sum(p.numel() for p in ResNet12(5).parameters()) == 12_427_525


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"ram": "much"}, "not a size"),
        ({"ram": 0}, "no memory at all"),
        ({"ram": "-5 KB"}, "not a size"),
        ({"prune_from": 0.9, "prune_to": 0.5}, "cannot end"),
    ],
)
def test_limits_that_make_no_sense_are_refused_when_they_are_given(field, says):
    with pytest.raises((UsageError, ValueError), match=says):
        PMeta(**field)
