"""What a rule has learned becomes a Plan, which does in PyTorch what the rule does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modicum.adapt import torch_optimizer, update
from modicum.apply import apply
from modicum.capture import capture
from modicum.errors import UsageError
from modicum.heads import few_shot
from modicum.live import LiveBytes
from modicum.meta import ANIL, BOIL, MAML, MAMLPP, PMeta, ProtoNet, Reptile, method_of
from modicum.meta.memory import StepMemory, dynamic_bytes
from modicum.models import Conv4
from modicum.optim import SGD
from modicum.plan import plan

SAMPLES = 6
RULES = {
    "maml": MAML(steps=3, rate=0.1),
    "maml frozen": MAML(steps=3, rate=0.1, norms="frozen"),
    "anil": ANIL(steps=2, rate=0.3),
    "boil": BOIL(steps=2, rate=0.1),
    "maml++": MAMLPP(steps=3, rate=0.1),
    "reptile": Reptile(steps=2, judged=3, rate=0.1),
    "p-meta": PMeta(steps=3, rate=0.1, channels="none"),
    "p-meta frozen": PMeta(steps=3, rate=0.1, channels="none", norms="frozen"),
    "p-meta attention": PMeta(steps=3, rate=0.1),
}


def learned(rule):
    """A net and its learner, with step sizes that differ, some of p-Meta's pruned."""
    torch.manual_seed(0)
    net = Conv4(3, 4, 1, 16).eval()
    learner = rule.learner(net).eval()
    with torch.no_grad():
        for name in ("alpha", "rates"):
            if isinstance(p := getattr(learner, name, None), nn.Parameter):
                p.mul_(0.5 + torch.rand_like(p))
                if rule.kind == "maml++":
                    p[0, 1].neg_()  # as it learns where less of a step is best
    if rule.kind == "p-meta":
        learner.allowed[0] = False
        learner.allowed[1, 1:] = False
    return net, learner


def planned(net, learner, accumulate=SAMPLES):
    learner.write_to(net)  # its attention, if there is
    graph = capture(net, torch.zeros(1, 1, 16, 16))
    return plan(graph, None, method_of(learner), SGD(lr=1.0), accumulate=accumulate)


def support():
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 1, 16, 16), torch.arange(SAMPLES) % 3


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_plan_takes_the_steps_that_the_rule_takes(rule):
    net, learner = learned(rule)
    made = planned(net, learner)
    assert made.inner_steps <= learner.judged
    x, y = support()
    with torch.no_grad():
        expected = learner.adapt(x, y, learner.judged)[-1]
    tuned = apply(net, made).train()
    optimizer = torch_optimizer(made.optimizer, tuned, made)
    for _ in range(learner.judged):
        nn.functional.cross_entropy(tuned(x), y).backward()
        update(optimizer, tuned)
    moved = {u.param for u in made.selection.updates}
    assert moved == set(learner.moved)
    got = tuned.learned()
    for name in moved:
        assert torch.allclose(got[name], expected[name], atol=2e-5), name


def test_pruned_steps_are_other_patterns():
    net, learner = learned(RULES["p-meta"])
    made = planned(net, learner)
    assert [p.steps for p in made.patterns] == [(0,), (1, 2)]
    assert "blocks.1.0" in made.steps[0].trains
    assert "blocks.1.0" not in made.steps[1].trains


def test_the_memory_model_is_that_of_the_plan_s_programs():
    net, learner = learned(RULES["p-meta frozen"])
    made = planned(net, learner, accumulate=1)
    memory = StepMemory(net, (1, 16, 16), SAMPLES, batch_norms=False)
    for k in range(3):
        program = made.programs[made.pattern_of(k)]
        active = learner.active(k)
        assert dynamic_bytes(program, SAMPLES)[1] == memory.peak(active)
        backward = sum(m.dx + m.dw for m in program.macs.values())
        assert memory.macs(active)[1] == SAMPLES * backward


def test_what_is_measured_shrinks_with_the_layers():
    """Bytes that PyTorch holds in the backward pass of a step."""
    peaks = {}
    for name in ("maml", "p-meta"):
        net, learner = learned(RULES[name])
        tuned = apply(net, planned(net, learner)).train()
        tuned.inner_step = 2
        x, y = support()
        with LiveBytes() as live:
            loss = nn.functional.cross_entropy(tuned(x), y)
            live.restart()
            loss.backward()
        peaks[name] = live.peak
    assert peaks["p-meta"] < peaks["maml"] / 4


def test_live_bytes_are_those_of_tensors_at_once():
    x = torch.ones(1000)
    with LiveBytes() as live:
        y = x * 2
        z = y + 1
        assert live.now == 8000
        del y
        assert live.now == 4000
        view = z[:10]
        del z
        assert live.now == 4000  # the view holds all of it
        del view
    assert (live.now, live.peak) == (0, 8000)


def test_what_has_no_inner_step_has_no_plan():
    torch.manual_seed(0)
    net = Conv4(3, 4, 1, 16)
    with pytest.raises(UsageError, match="takes no gradient steps"):
        method_of(ProtoNet().learner(few_shot(net, 3)))
    with pytest.raises(UsageError, match="no inner step"):
        method_of(MAML().learner(net), steps=0)
