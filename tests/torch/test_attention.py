"""p-Meta's channel attention under a Plan: the masked dense update, without what it masks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from cases import seq
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import held_bytes, kept_bytes, randomise
from torch import Tensor, nn

import modicum as mo
from modicum.adapt import torch_optimizer, update
from modicum.apply import Tuned
from modicum.attended import ChannelAttention, attach, detach, without_attention
from modicum.errors import InvalidInput, UsageError
from modicum.graph import Graph
from modicum.heads import last_linear
from modicum.lite import StandardisedConv2d
from modicum.meta import MAML, PMeta, ProtoNet, method_of
from modicum.meta.inner import loss_of
from modicum.meta.pmeta import PMetaLearner
from modicum.models.weights import load_weights
from modicum.ops.attention import clip, most_kept
from modicum.plan import Plan

SAMPLES, STEPS = 4, 3


@dataclass
class Learned:
    """A net, what p-Meta learned for it, the net with its attention, and the plan of that."""

    net: nn.Module
    learner: PMetaLearner
    attended: nn.Module
    graph: Graph
    plan: Plan


def layers(groups: int = 3) -> nn.Module:
    """Convolutions of all kinds and a hidden linear layer, each with branches, below a head."""
    return seq(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.ReLU()),
        *(nn.Conv2d(6, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6), nn.ReLU()),
        nn.Linear(6, 4),
    )


def learned(net: nn.Module, shape=(2, 6, 6), loss="mse", accumulate=SAMPLES, **fields) -> Learned:
    """Steps of which each updates other layers; attention far from equal scores."""
    torch.manual_seed(0)
    rule = PMeta(**{"steps": STEPS, "rate": 0.125, "rho": 0.5, "norms": "frozen", **fields})
    learner = rule.learner(net).eval()
    with torch.no_grad():
        for p in learner.attention.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    if len(learner.layers) > 3:
        learner.allowed[0, 1:] = False
        learner.allowed[1, 0] = False
    attended = copy.deepcopy(net)
    learner.write_to(attended)
    graph = mo.capture(attended, torch.zeros(1, *shape))
    method = method_of(learner)
    plan = mo.plan(graph, None, method, mo.SGD(lr=1.0), loss=loss, accumulate=accumulate)
    return Learned(net, learner, attended, graph, plan)


def few_bits(net: nn.Module) -> nn.Module:
    """Weights of which sums of products do not round in double precision."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((4 * p).round().clamp(-4, 4) / 4)
    return net


def double(made: Learned) -> tuple[Tuned, PMetaLearner]:
    return mo.apply(made.attended, made.plan).double().train(), copy.deepcopy(made.learner).double()


def support(exact: bool, outputs: int = 4, shape=(2, 6, 6)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(SAMPLES, *shape).double(), torch.randn(SAMPLES, outputs).double()
    return ((2 * x).round() / 2, (2 * y).round() / 2) if exact else (x, y)


def step_of(tuned: Tuned, x: Tensor, y: Tensor, one_by_one: bool) -> None:
    """An inner step; one by one the samples pass twice, as on a board."""
    parts = [(x, y)] if not one_by_one else list(zip(x.split(1), y.split(1), strict=True))

    def passes() -> None:
        for part, target in parts:
            (loss_of(tuned(part), target) * len(part) / len(x)).backward()

    if one_by_one and tuned.attends:
        with tuned.look():
            passes()
    passes()
    update(torch_optimizer(tuned.plan.optimizer, tuned, tuned.plan), tuned)


# ---- the update ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", ["both", "fw", "bw"])
@pytest.mark.parametrize("k", range(STEPS))
def test_the_sparse_update_equals_the_masked_dense_one_bit_for_bit(k, channels):
    made = learned(few_bits(randomise(layers())), channels=channels)
    tuned, learner = double(made)
    x, y = support(exact=True)
    start = {name: p.detach().clone() for name, p in learner.net.named_parameters()}
    with torch.no_grad():
        want = learner.step(start, x, lambda out, _: loss_of(out, y), k)
    tuned.inner_step = k
    step_of(tuned, x, y, one_by_one=False)
    moved = masked = 0
    for name, value in tuned.learned().items():
        assert torch.equal(value, want[name]), name
        changed = value != start[name]
        moved, masked = moved + int(changed.sum()), masked + int((~changed).sum())
    assert moved > 0 and masked > moved
    gates = [gate for pair in tuned.gates.values() for gate in pair if gate is not None]
    assert any(int((gate > 0).sum()) > 1 for gate in gates)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "one by one"])
@pytest.mark.parametrize("channels", ["both", "fw", "bw"])
def test_a_task_is_learned_as_the_rule_learns_it(channels, one_by_one):
    made = learned(randomise(layers(6)), channels=channels)
    tuned, learner = double(made)
    x, y = support(exact=False)
    with torch.no_grad():
        want = learner.adapt(x, y, STEPS)[-1]
    for _ in range(STEPS):
        step_of(tuned, x, y, one_by_one)
    for name, value in tuned.learned().items():
        assert torch.allclose(value, want[name], rtol=0, atol=1e-12), name


def test_adapt_looks_at_the_samples_of_an_update_before_it_learns_from_them():
    made = learned(randomise(layers()), loss="cross_entropy")
    x, y = support(exact=False)[0].float(), torch.arange(SAMPLES)
    with torch.no_grad():
        want = made.learner.adapt(x, y, STEPS)[-1]
    for together in (1, SAMPLES):
        data = (x.numpy(), y.numpy())
        trace = mo.adapt(made.attended, made.plan, data, epochs=STEPS, micro_batch=together)
        for name, value in trace.state.items():
            assert torch.allclose(torch.from_numpy(value), want[name], atol=1e-5), name
    with pytest.raises(UsageError, match="3 samples are not whole updates of 4"):
        mo.adapt(made.attended, made.plan, (x[:3].numpy(), y[:3].numpy()), epochs=1)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_layers_are_updated_as_the_rule_updates_them(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    inp, out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    size, kernel = draw(st.integers(3, 7)), draw(st.integers(1, 3))
    more = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2))}
    conv = nn.Conv2d(inp, out, kernel, groups=groups, bias=draw(st.booleans()), **more)
    wide = conv(torch.zeros(1, inp, size, size)).numel()
    hidden = nn.Linear(wide, draw(st.integers(1, 9)))
    net = randomise(seq(conv, nn.ReLU(), nn.Flatten(), hidden, nn.Linear(hidden.out_features, 4)))
    sides, rho = draw(st.sampled_from(["both", "fw", "bw"])), draw(st.floats(0.01, 1.0))
    made = learned(net, (inp, size, size), channels=sides, rho=rho, steps=1)
    tuned, learner = double(made)
    x, y = support(exact=False, shape=(inp, size, size))
    with torch.no_grad():
        want = learner.adapt(x, y, 1)[-1]
    step_of(tuned, x, y, one_by_one=draw(st.booleans()))
    for name, value in tuned.learned().items():
        scale = max(1.0, float(want[name].abs().max()))
        assert torch.allclose(value, want[name], rtol=0, atol=1e-12 * scale), name
    for name, gates in tuned.gates.items():
        for gate, n in zip(gates, _channels(tuned, name), strict=True):
            assert gate is None or 1 <= int((gate > 0).sum()) <= most_kept(n, rho)


def _channels(tuned: Tuned, layer: str) -> tuple[int, int]:
    out, inp = tuned.plan.graph.params[f"{layer}.weight"].shape[:2]
    return inp, out


# ---- what is kept and computed ---------------------------------------------------------------


@pytest.mark.parametrize("channels", ["both", "fw", "bw"])
def test_what_autograd_keeps_is_what_the_gates_let_through_and_at_most_what_the_plan_says(channels):
    made = learned(randomise(layers()), loss="cross_entropy", channels=channels, rho=0.4)
    tuned = mo.apply(made.attended, made.plan).train()
    x = torch.randn(1, 2, 6, 6)
    for step in range(STEPS):
        tuned.inner_step = step
        held = held_bytes(tuned, x)
        nn.functional.cross_entropy(tuned(x), torch.tensor([1])).backward()
        program = made.plan.programs[made.plan.pattern_of(step)]
        bound = kept_bytes(made.plan, step)
        assert bound == made.plan.steps[min(step, made.plan.inner_steps - 1)].saved
        exact = bound
        for node in program.graph.nodes:
            for kept in program.kept[node.name]:
                if kept.kind == "gated":
                    fw, _ = tuned.gates[node.name]
                    each = program.graph.values[kept.value].bytes // len(fw)
                    exact += each * int((fw > 0).sum()) - kept.bytes
        assert held == exact <= bound


def test_a_pass_that_looks_keeps_no_input_of_a_weight_and_moves_nothing():
    made = learned(randomise(layers()), loss="cross_entropy")
    tuned = mo.apply(made.attended, made.plan).train()
    x, y = torch.randn(SAMPLES, 2, 6, 6), torch.arange(SAMPLES)
    before = {name: p.detach().clone() for name, p in tuned.trained.items()}
    with tuned.look():
        held = held_bytes(tuned, x[:1])
        nn.functional.cross_entropy(tuned(x), y).backward()
    assert held == made.plan.looks[0].saved_bytes < made.plan.steps[0].saved
    assert all(p.grad is None for p in tuned.trained.values())
    assert all(torch.equal(p, before[name]) for name, p in tuned.trained.items())


def test_a_look_without_a_backward_pass_is_refused():
    made = learned(randomise(layers()))
    tuned = mo.apply(made.attended, made.plan).train()
    with pytest.raises(UsageError, match="nothing passed '0' while it looked"), tuned.look():
        tuned(torch.randn(SAMPLES, 2, 6, 6))
    loss_of(tuned(torch.randn(SAMPLES, 2, 6, 6)), torch.zeros(SAMPLES, 4)).backward()
    assert tuned.trained["0.weight"].grad is not None


def test_back_propagation_stops_at_the_lowest_layer_that_a_step_updates():
    made = learned(randomise(layers()))
    program = made.plan.programs[made.plan.pattern_of(1)]
    assert made.plan.steps[1].trains[0] == "2"
    assert not program.wanted["0"].any and not any(program.wanted["2"].dx)
    plain = mo.capture(made.net, torch.zeros(1, 2, 6, 6))
    whole = mo.plan(plain, None, method_of(made.learner).model_copy(
        update={"attended": ()}), mo.SGD(lr=1.0), loss="mse", accumulate=SAMPLES)  # fmt: skip
    for a, b in zip(made.plan.steps, whole.steps, strict=True):
        assert a.saved < b.saved and a.macs_backward < b.macs_backward
        assert a.macs_look > 0 == b.macs_look
    assert made.plan.cost.accumulator_bytes < whole.cost.accumulator_bytes


def test_norms_follow_a_sample_once_though_it_passes_twice():
    net = randomise(seq(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 2),
                        nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 4)))  # fmt: skip
    made = learned(net, norms="batch", loss="cross_entropy", steps=1)
    x, y = torch.randn(SAMPLES, 2, 6, 6), torch.arange(SAMPLES)
    after = []
    for looks in (False, True):
        tuned = mo.apply(made.attended, made.plan).train()
        if looks:
            with tuned.look():
                nn.functional.cross_entropy(tuned(x), y).backward()
        nn.functional.cross_entropy(tuned(x), y).backward()
        assert len(tuned.gates) == 2
        after.append({name: t.clone() for name, t in tuned.moving.items()})
        after.append({name: p.grad for name, p in tuned.trained.items()})
    assert any("running_mean" in name for name in after[0])
    for a, b in ((after[0], after[2]), (after[1], after[3])):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the net that has it ---------------------------------------------------------------------


def test_attention_travels_in_the_weights_and_changes_no_prediction(tmp_path):
    made = learned(randomise(layers()))
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(made.attended(x), made.net(x))
    torch.save(made.attended.state_dict(), tmp_path / "weights.pt")
    other = layers()
    load_weights(other, tmp_path / "weights.pt")
    assert mo.capture(other, x).hash == made.graph.hash != mo.capture(made.net, x).hash
    assert torch.equal(other(x), made.net(x))
    saved = made.plan.model_dump_json()
    assert mo.Plan.model_validate_json(saved) == made.plan
    made.plan.save(tmp_path / "plan.json")
    assert mo.Plan.load(tmp_path / "plan.json") == made.plan


def test_weights_that_do_not_fit_leave_a_net_without_attention():
    made = learned(randomise(layers()))
    state = {**made.attended.state_dict(), "0.weight": torch.zeros(5, 2, 3, 3)}
    net = layers()
    with pytest.raises(InvalidInput, match="do not fit"):
        load_weights(net, state)
    assert net.state_dict().keys() == layers().state_dict().keys()
    with pytest.raises(InvalidInput, match="channel attention of '2'"):
        load_weights(seq(nn.Conv2d(2, 6, 3, padding=1)), made.attended.state_dict())


def test_attention_can_be_taken_away_and_a_net_with_it_be_trained_anew():
    made = learned(randomise(layers()))
    names = layers().state_dict().keys()
    assert without_attention(made.attended).state_dict().keys() == names
    again = PMeta(steps=STEPS).learner(made.attended)
    assert again.layers == made.learner.layers
    MAML(steps=1).learner(made.attended).write_to(made.attended)
    assert made.attended.state_dict().keys() == names
    attach(made.attended, {"0": ChannelAttention(None, 6)}, 0.5)
    detach(made.attended)
    assert mo.capture(made.attended, torch.zeros(1, 2, 6, 6)).nodes[0].attrs.get("rho") is None
    with pytest.raises(UsageError, match="ReLU cannot have channel attention"):
        attach(made.attended, {"1": ChannelAttention(None, 6)}, 0.5)


def test_a_layer_that_no_step_updates_loses_its_attention_and_joins_its_norm():
    net = randomise(seq(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 2),
                        nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 4)))  # fmt: skip
    made = learned(net)
    only = {"3.weight": None, "3.bias": None}
    method = mo.Explicit(params=only, attended=("3.weight",))
    plan = mo.plan(made.graph, None, method, mo.SGD(lr=1.0), loss="mse")
    nodes = plan.program.graph.by_name
    assert "1" not in nodes and "rho" not in nodes["0"].attrs
    assert "4" in nodes and nodes["3"].attrs["rho"] == 0.5 and nodes["3"].op == "conv2d"


# ---- refusals --------------------------------------------------------------------------------


def test_a_method_of_attention_is_refused_for_the_net_without_it():
    made = learned(randomise(layers()))
    plain = mo.capture(made.net, torch.zeros(1, 2, 6, 6))
    with pytest.raises(UsageError, match=r"no channel attention at '0\.weight'"):
        mo.plan(plain, None, method_of(made.learner), mo.SGD(lr=1.0))


@pytest.mark.parametrize(
    ("params", "optimizer", "why"),
    [
        ({"4.*": None}, mo.Adam(), "goes with plain SGD"),
        ({"4.*": None}, mo.SGD(momentum=0.9), "goes with plain SGD"),
        ({"4.*": None}, mo.SGD(weight_decay=0.1), "goes with plain SGD"),
        ({"4.weight": {"out": (0, 1)}}, mo.SGD(), "chooses what is updated"),
        ({"4.weight": {"inp": (0, 1)}}, mo.SGD(), "chooses what is updated"),
        (
            {"4.weight": {"rates": (1.0, 0.0)}, "4.bias": None, "9.*": None},
            mo.SGD(),
            "chooses what",
        ),
    ],
)
def test_what_attention_does_not_go_with_is_refused(params, optimizer, why):
    made = learned(randomise(layers()))
    with pytest.raises(UsageError, match=why):
        mo.plan(made.graph, None, mo.Explicit(params=params, attended=("4.weight",)), optimizer)


@pytest.mark.parametrize("method", [mo.Full(), mo.Last(n=2), mo.Bias(), mo.Explicit(params={
    "4.weight": {"out": (0, 1)}})], ids=lambda m: m.kind)  # fmt: skip
def test_methods_that_do_not_ask_for_attention_update_as_if_there_were_none(method):
    made = learned(randomise(layers()))
    plain = mo.capture(made.net, torch.zeros(1, 2, 6, 6))
    plans = [mo.plan(g, None, method, mo.Adam(lr=0.01)) for g in (made.graph, plain)]
    assert not plans[0].attends and plans[0].cost == plans[1].cost
    x, _ = support(False)
    learned_by = []
    for net, plan in zip((made.attended, made.net), plans, strict=True):
        tuned = mo.apply(net, plan).train()
        optimizer = torch_optimizer(plan.optimizer, tuned, plan)
        nn.functional.cross_entropy(tuned(x.float()), torch.arange(len(x)) % 4).backward()
        update(optimizer, tuned)
        learned_by.append(tuned.learned())
    assert all(torch.equal(v, learned_by[1][k]) for k, v in learned_by[0].items())


def test_a_share_of_1_keeps_every_channel_however_sums_round():
    passed = 0
    for seed in range(50):
        z = 8 * torch.randn(400, generator=torch.Generator().manual_seed(seed))
        z[-3:] = -30.0  # scores that are not 0, and hardly add to a sum
        s = z.softmax(0)
        passed += int(s.sort(descending=True).values.cumsum(0)[-4] > 1)
        assert (clip(s, 1.0) > 0).all()
    assert passed  # the sum of the others


def test_a_head_is_no_branch_of_attention():
    net = seq(nn.Linear(6, 4), nn.ReLU(), nn.Conv2d(2, 3, 3))
    attach(net, {"2": ChannelAttention(None, 3)}, 0.5)
    assert last_linear(net)[0] == "0"
    alone = seq(nn.Conv2d(2, 3, 3))
    attach(alone, {"0": ChannelAttention(None, 3)}, 0.5)
    with pytest.raises(UsageError, match="no linear layer"):
        last_linear(alone)


def test_prototypes_are_learned_for_a_net_without_the_attention_that_it_had():
    made = learned(randomise(layers()))
    net = mo.few_shot(made.attended, 3)
    assert any("attention" in name for name in net.state_dict())
    ProtoNet().learner(net).write_to(net)
    assert not any("attention" in name for name in net.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("0.attention.bw.up.bias", torch.tensor(1.0), "no vector"),
        ("0.attention._extra_state", torch.tensor([0.5, 0.5]), "rho"),
        ("0.attention._extra_state", torch.tensor(2.0), "rho"),
        ("0.attention.bw.up.bias", torch.zeros(4), "of another layer"),
    ],
)
def test_damaged_attention_in_weights_is_refused_and_the_net_left_alone(key, value, why):
    made = learned(randomise(layers()))
    net = layers()
    with pytest.raises(InvalidInput, match=why):
        load_weights(net, {**made.attended.state_dict(), key: value})
    assert net.state_dict().keys() == layers().state_dict().keys()


class Named(nn.Module):
    """Calls its layer by the name of the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(input=x).flatten(1))


def test_nets_that_call_layers_by_name_or_are_double_have_attention_too():
    made = learned(Named())
    assert made.plan.attends
    x, _ = support(False)
    learner = PMeta(steps=1).learner(Named().double()).train()
    assert learner.adapt(x.double(), torch.arange(len(x)) % 4, 1)


def test_rows_of_a_sequence_have_no_channels_to_choose():
    net = nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 3))
    learner = PMeta(steps=1).learner(net).train()
    with pytest.raises(UsageError, match="3 dimensions"):
        learner.adapt(torch.randn(3, 3, 6), torch.arange(3), 1)


def test_what_updates_nothing_in_some_step_is_no_method():
    learner = PMeta(steps=2).learner(layers())
    learner.allowed[:, 1] = False
    with pytest.raises(UsageError, match="inner step 1 of what was learned updates nothing"):
        method_of(learner)


def test_attention_of_a_standardised_weight_is_refused_where_it_is_trained():
    net = randomise(seq(StandardisedConv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 4)))
    attach(net, {"0": ChannelAttention(2, 4)}, 0.5)
    graph = mo.capture(net, torch.zeros(1, 2, 6, 6))
    assert not mo.plan(graph).attends
    with pytest.raises(UsageError, match="its weight is standardised"):
        mo.plan(graph, None, mo.Explicit(params={"0.*": None}, attended=("0.weight",)))


def test_a_bias_alone_is_updated_as_ever():
    made = learned(randomise(layers()))
    plan = mo.plan(made.graph, None, mo.Explicit(params={"4.bias": None}), mo.Adam())
    assert not plan.attends
    with (
        pytest.raises(UsageError, match="no attention chooses"),
        mo.apply(made.attended, plan).look(),
    ):
        pass


@pytest.mark.parametrize("look", [None, {}, {"input": 0}])
def test_a_plan_without_a_place_for_the_first_pass_is_refused(look):
    plan = learned(randomise(layers())).plan
    first = plan.patterns[0].model_copy(update={"look": look})
    broken = plan.model_copy(update={"patterns": (first, *plan.patterns[1:])})
    with pytest.raises(InvalidInput):
        broken.check()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [("rho", 0.0, "rho is 0.0"), ("rho", 1.5, "rho is 1.5"), ("groups", 2, "do not fit 2 groups")],
)
def test_a_damaged_layer_is_refused(key, value, why):
    from modicum.ops import check_graph

    made = learned(randomise(layers()))
    node = made.graph.nodes[0]
    broken = node.model_copy(update={"attrs": {**node.attrs, key: value}})
    graph = made.graph.model_copy(update={"nodes": (broken, *made.graph.nodes[1:])})
    with pytest.raises(InvalidInput) as caught:
        check_graph(graph)
    assert why in str(caught.value)
