from __future__ import annotations

from itertools import count, pairwise

import numpy as np
import pytest
import torch
from federated.lines import Lines, make_net

import modicum as mo
from modicum.errors import UsageError
from modicum.federated.client import Kept, settle, take_part
from modicum.federated.codec import Message, decode, encode
from modicum.federated.layout import Layout
from modicum.federated.rules import FedAvg, FedRecon, Reptile, TinyMetaFed, TinyReptile

KINDS = ("torch", "native")
LOCAL = ("head.*",)
METAFED = TinyMetaFed(local=LOCAL, rate=0.05, rate_local=0.1, support=4, query=6, top=0.3)
RULES = {
    "fedavg": FedAvg(rate=0.05, query=8, batch=4, passes=2),
    "reptile": Reptile(rate=0.05, query=8, batch=4, passes=2),
    "tinyreptile": TinyReptile(rate=0.05, query=8),
    "fedrecon": FedRecon(
        local=LOCAL, rate=0.05, rate_local=0.1, support=4, query=8, batch=4, passes=2
    ),
    "tinymetafed": METAFED,
    "tinymetafed, body local": METAFED.model_copy(update={"local": ("body.*",)}),
}


def download(learner, shared, number=1):
    layout = learner.layout
    return encode(Message("weights", layout.model, number, layout.size, shared))


def change(learner, learned):
    layout = learner.layout
    return decode(learned.upload, model=layout.model, size=layout.size, kind="delta")


def streams(rule, client=0, seed=0):
    return Lines().streams(client, rule.support, rule.query, np.random.default_rng(seed))


def by_hand(rule, net, shared_names, support, query):
    """The client's loop as its equations say, with autograd and all samples at hand."""
    local = [p for n, p in net.named_parameters() if n not in shared_names]
    shared = [p for n, p in net.named_parameters() if n in shared_names]

    def learn(samples, params, rate):
        for i in range(0, len(samples), rule.batch):
            batch = samples[i : i + rule.batch]
            x, y = (torch.from_numpy(np.stack(side)) for side in zip(*batch, strict=True))
            grads = torch.autograd.grad(nn_loss(net(x), y), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p -= rate * g

    learn(support, local, rule.rate_local)
    for _ in range(rule.passes):
        learn(query, shared, rule.rate)


def nn_loss(out, y):
    return ((out - y) ** 2).mean()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_is_what_the_equations_say(learners, kind, name):
    rule = RULES[name]
    learner = learners(kind, rule)
    net = make_net()
    start = learner.layout.join({k: v.numpy() for k, v in net.state_dict().items()})
    learned = take_part(learner, rule, download(learner, start), *streams(rule))
    by_hand(rule, net, {p.name for p in learner.layout.parts}, *map(list, streams(rule)))
    want = learner.layout.join({k: v.numpy() for k, v in net.state_dict().items()}) - start
    message = change(learner, learned)
    assert learned.samples == rule.query and np.isfinite(learned.loss)
    if rule.top < 1:
        kept = int(np.ceil(rule.top * learner.layout.size))
        assert len(message.values) <= kept
        assert set(message.where) <= set(np.argsort(-np.abs(want), kind="stable")[: kept + 1])
        np.testing.assert_allclose(message.values, want[message.where], atol=2e-6)
    else:
        np.testing.assert_allclose(message.values, want, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tinyreptile_with_one_step_equals_a_hand_computation(learners, kind):
    """One linear unit in reach: dL/db of the head is 2 (y' - y), so b moves by -rate times it."""
    rule = TinyReptile(rate=0.1, query=1)
    learner = learners(kind, rule)
    layout = learner.layout
    start = np.zeros(layout.size, np.float32)  # then the output is 0, and the body learns nothing
    x, y = np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)
    learned = take_part(learner, rule, download(learner, start), iter([]), iter([(x, y)]))
    found = layout.split(change(learner, learned).dense())
    assert found["head.bias"] == pytest.approx(0.1 * 2 * 3.0)
    assert learned.loss == pytest.approx(9.0)
    assert all((v == 0).all() for k, v in found.items() if k != "head.bias")


def test_both_learners_see_the_same_and_c_to_the_bit_again(learners):
    for rule in (METAFED, RULES["fedavg"]):
        torch_, native = (learners(k, rule) for k in KINDS)
        assert torch_.layout == native.layout
        start = torch_.shared()
        native.begin(start)
        assert np.array_equal(native.shared(), start)
        for seed in range(3):
            a, b, c = (
                take_part(learner, rule, download(learner, start), *streams(rule, seed=seed))
                for learner in (torch_, native, native)
            )
            assert a.loss == pytest.approx(b.loss, rel=1e-4)
            assert b.upload == c.upload


def test_local_parameters_begin_anew_with_every_task(learners):
    for kind in KINDS:
        learner = learners(kind, METAFED)
        start = learner.shared()
        uploads = {
            take_part(learner, METAFED, download(learner, start), *streams(METAFED)).upload
            for _ in range(2)
        }
        assert len(uploads) == 1


@pytest.mark.parametrize("name", RULES)
def test_what_is_sent_holds_no_local_parameter(learners, name):
    """At the message: its vector has room for the shared parameters alone, and moves with them."""
    rule = RULES[name]
    learner = learners("native", rule)
    names = {p.name for p in learner.layout.parts}
    every = {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}
    local = {p.name for p in learner.layout.local}
    assert names | local == every and not names & local
    assert bool(local) == bool(rule.local)
    learned = take_part(learner, rule, download(learner, learner.shared()), *streams(rule))
    message = change(learner, learned)
    sizes = {"body.0.weight": 16, "body.0.bias": 8, "head.weight": 8, "head.bias": 1}
    assert message.size == sum(sizes[n] for n in names)
    assert len(learned.upload) < 36 + 4 * message.size + 8
    kept = learned.kept
    assert kept.unsent is None
    assert kept.shared is None or kept.shared.shape == (message.size,)


def test_nothing_is_kept_that_the_rule_does_not_ask_for(learners):
    rule = RULES["tinyreptile"]
    learner = learners("native", rule)
    assert take_part(learner, rule, download(learner, learner.shared()), *streams(rule)).kept == (
        Kept()
    )


def test_a_sample_of_the_stream_is_read_once_and_one_at_a_time(learners):
    """O(1) memory: when a sample comes, the ones before have been learned from."""
    rule = RULES["tinyreptile"]
    learner = learners("native", rule)
    seen = []

    def stream():
        for i in count():
            seen.append(learner.shared().copy())
            yield np.array([i, 1], np.float32) / 10, np.array([1.0], np.float32)

    take_part(learner, rule, download(learner, learner.shared()), iter([]), stream())
    assert len(seen) == rule.query, "no sample is drawn ahead"
    assert all((a != b).any() for a, b in pairwise(seen))


def test_error_feedback_sends_later_what_was_left_out(learners):
    rule = METAFED.model_copy(update={"feedback": True, "values": "int8"})
    learner = learners("native", rule)
    start = learner.shared()
    first = take_part(learner, rule, download(learner, start), *streams(rule))
    learner.begin(start)
    sent = change(learner, first).dense()
    plain = METAFED.model_copy(update={"top": 1.0})
    whole = change(
        learner, take_part(learner, plain, download(learner, start), *streams(plain))
    ).dense()
    np.testing.assert_allclose(sent + first.kept.unsent, whole, atol=1e-6)
    second = take_part(learner, rule, download(learner, start, 2), *streams(rule), first.kept)
    total = change(learner, second).dense() + second.kept.unsent
    np.testing.assert_allclose(total, whole + first.kept.unsent, atol=1e-6)


def test_a_download_that_builds_on_other_weights_is_refused(learners):
    learner = learners("native", METAFED)
    layout = learner.layout
    part = Message(
        "weights", layout.model, 5, layout.size, np.ones(1, np.float32), np.array([0]), base=3
    )
    for kept in (Kept(), Kept(learner.shared(), 2)):
        with pytest.raises(mo.InvalidInput, match="weights of round 3"):
            take_part(learner, METAFED, encode(part), *streams(METAFED), kept)
    took = take_part(
        learner, METAFED, encode(part), *streams(METAFED), Kept(learner.shared() * 0, 3)
    )
    assert took.kept.round == 5 and took.kept.shared[0] == 1 and not took.kept.shared[1:].any()


def test_too_few_samples_are_an_error_and_not_a_smaller_round(learners):
    learner = learners("native", METAFED)
    blob = download(learner, learner.shared())
    few = list(streams(METAFED)[1])[:3]
    with pytest.raises(UsageError, match="3 samples where its rule takes 6"):
        take_part(learner, METAFED, blob, streams(METAFED)[0], iter(few))


def test_a_diverging_client_sends_nothing(learners):
    for kind in KINDS:
        rule = TinyReptile(rate=1e6, query=8)
        learner = learners(kind, rule)
        with pytest.raises(mo.ModicumError):
            take_part(learner, rule, download(learner, learner.shared()), *streams(rule))
        learner.begin(learner.layout.check(np.zeros(learner.layout.size, np.float32)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_client_reconstructs_then_tunes(learners, kind):
    rule = METAFED.model_copy(
        update={"reconstruct": 2, "tune": 3, "rate": 0.01, "rate_local": 0.01}
    )
    learner = learners(kind, rule, shots=5)
    population = Lines()
    shots, tests = population.newcomer(0, 5, 40, np.random.default_rng(0))
    judged = settle(learner, rule, learner.shared(), shots, tests)
    assert judged.after < judged.before and judged.tests == 40
    start = learner.shared()
    learner.begin(start)
    for x, y in [s for _ in range(2) for s in shots]:
        learner.learn(x, y)
    assert not np.array_equal(learner.predict(tests[0][0]), start)
    assert np.array_equal(learner.shared(), start), "reconstruction leaves the shared part"
    learner.learn(*shots[0])
    assert not np.array_equal(learner.shared(), start)


def test_accuracy_is_judged_where_targets_are_labels():
    from modicum.federated.client import judge

    class Fixed:
        def predict(self, x):
            return x

    tests = [(np.eye(3, dtype=np.float32)[k], label) for k, label in ((0, 0), (1, 2), (2, 2))]
    assert judge(Fixed(), tests) == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="nothing to test"):
        judge(Fixed(), [])


def test_a_layout_says_who_understands_whom():
    net = make_net()
    graph = mo.capture(net, torch.zeros(1, 2))

    def layout(rule, board=None, local=()):
        method, optimizer = rule.training(graph)
        plan = mo.plan(graph, board, method, optimizer, loss="mse", accumulate=rule.batch)
        return Layout.of(plan, local)

    same = layout(TinyReptile())
    assert layout(FedAvg(), "nano33ble").model == same.model, "batches and boards are one's own"
    assert layout(METAFED, local=LOCAL).model != same.model
    with pytest.raises(UsageError, match=r"matches 'tail\.\*'"):
        layout(TinyReptile(), local=("tail.*",))
    with pytest.raises(UsageError, match="nothing is left"):
        layout(TinyReptile(), local=("*",))
    with pytest.raises(UsageError, match="to be local"):
        METAFED.model_copy(update={"local": ("tail.*",)}).training(graph)
    vector = np.arange(same.size, dtype=np.float32)
    assert np.array_equal(same.join(same.split(vector)), vector)
    assert np.array_equal(same.from_c(same.to_c(vector)), vector)
    with pytest.raises(mo.InvalidInput, match="not finite"):
        same.split(vector * np.nan)
    with pytest.raises(mo.InvalidInput, match="shape"):
        same.split(vector[:-1])
