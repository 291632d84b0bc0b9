"""learn_task, observe_task, refresh, of_ways: a user's own task, as a Trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import modicum as mo
from modicum import fewshot
from modicum.errors import InvalidInput, UsageError
from modicum.fewshot import learn_task, observe_task, refresh, task_accuracy
from modicum.tasks import PseudoQuery, pseudo_query

CONFIG = mo.FineTune(iterations=5)


def net(ways: int = 3) -> mo.FewShot:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1),
              nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))  # fmt: skip
    return mo.few_shot(nn.Sequential(*layers), ways).eval()


def samples(each: int, seed: int = 0):
    """Each class is a noisy picture of its own."""
    base = np.random.default_rng(9).normal(size=(3, 1, 8, 8))
    y = np.arange(3 * each) % 3
    noise = np.random.default_rng(seed).normal(size=(len(y), 1, 8, 8))
    return (base[y] + noise).astype(np.float32), y


SUPPORT, QUERY = samples(5), samples(8, seed=1)


GRAPHS: dict[str, mo.Graph] = {}


def graph_of(model: nn.Module) -> mo.Graph:
    """Captured once: that takes longer than to learn a task."""
    key = f"{model} {[tuple(v.shape) for v in model.state_dict().values()]}"
    if key not in GRAPHS:
        GRAPHS[key] = mo.capture(model, torch.zeros(1, 1, 8, 8))
    return GRAPHS[key]


def plan_of(model: nn.Module, lr: float = 0.01) -> mo.Plan:
    return mo.plan(graph_of(model), None, mo.Full(), mo.Adam(lr=lr))


def test_a_trace_has_what_was_learned_and_leaves_the_model_alone():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = plan_of(model)
    trace = learn_task(model, made, SUPPORT, CONFIG, test=QUERY, seed=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    tuned, learned = mo.fine_tune(model, made, SUPPORT, CONFIG, seed=3)
    assert trace.losses == learned.losses and len(trace.losses) == 5
    assert (trace.plan_hash, trace.seed, trace.where) == (made.hash, 3, "torch")
    assert trace.accuracy_after == task_accuracy(tuned, QUERY)
    refresh(model, SUPPORT)
    assert trace.accuracy_before == task_accuracy(model, QUERY)
    assert trace.logits_before == pytest.approx(model(torch.from_numpy(QUERY[0])).detach().numpy(),
                                                abs=1e-5)  # fmt: skip
    assert trace.figures["seconds"] > 0


def test_its_state_predicts_what_it_says(tmp_path):
    model = net()
    trace = learn_task(model, plan_of(model), SUPPORT, CONFIG, test=QUERY)
    trace.save(tmp_path / "trace.json")
    kept = mo.Trace.load(tmp_path / "trace.json").state
    assert "head.prototypes" in kept
    model.load_state_dict({**model.state_dict(), **{k: torch.tensor(v) for k, v in kept.items()}})
    assert task_accuracy(model, QUERY) == trace.accuracy_after
    assert np.abs(model.head.prototypes.numpy()).max() > 0


def test_without_queries_there_is_no_accuracy():
    model = net()
    trace = learn_task(model, plan_of(model), SUPPORT, CONFIG)
    assert trace.accuracy_before is None and trace.logits_after is None


def test_the_entropy_looks_at_the_queries_but_not_at_their_labels():
    model = net()
    config = CONFIG.model_copy(update={"entropy": 1.0})
    one = learn_task(model, plan_of(model), SUPPORT, config, test=QUERY)
    other = learn_task(model, plan_of(model), SUPPORT, config, test=(QUERY[0], QUERY[1][::-1]))
    assert one.losses == other.losses != learn_task(model, plan_of(model), SUPPORT, CONFIG).losses
    with pytest.raises(UsageError, match="entropy of what queries"):
        learn_task(model, plan_of(model), SUPPORT, config)


def test_a_linear_head_starts_from_what_it_knows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    trace = learn_task(model, plan_of(model, lr=0.05), SUPPORT,
                       mo.FineTune(iterations=30), test=QUERY)  # fmt: skip
    assert trace.accuracy_after > trace.accuracy_before + 0.2


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ((SUPPORT[0][:, :, :7], SUPPORT[1]), "the inputs have shape"),
        ((SUPPORT[0], SUPPORT[1] + 1), "labels must be whole numbers"),
        ((SUPPORT[0][:0], SUPPORT[1][:0]), "no samples"),
    ],
)
def test_samples_that_do_not_fit_are_refused(support, message):
    model = net()
    with pytest.raises(InvalidInput, match=message):
        learn_task(model, plan_of(model), support, CONFIG)
    with pytest.raises(InvalidInput, match=message):
        learn_task(model, plan_of(model), SUPPORT, CONFIG, test=support)


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(InvalidInput):
        learn_task(net(), plan_of(net(4)), SUPPORT, CONFIG)


# ---- observing ---------------------------------------------------------------------------------


def test_a_few_shot_model_is_observed_on_pseudo_queries():
    model, method = net(), mo.TinyTrain(ram="1MiB", macs_fraction=1.0)
    graph = graph_of(model)
    seen = observe_task(model, graph, method, SUPPORT, PseudoQuery(translate=0.25), seed=4)
    asked = pseudo_query(SUPPORT[0], PseudoQuery(translate=0.25), seed=4, step=fewshot.OBSERVED)
    known = mo.observe(model, graph, method, SUPPORT, queries=(asked, SUPPORT[1]))
    assert seen.fisher == known.fisher
    assert seen.fisher != mo.observe(model, graph, method, SUPPORT).fisher


def test_a_linear_head_and_a_method_of_weights_are_observed_on_the_samples_alone(monkeypatch):
    monkeypatch.setattr(fewshot, "pseudo_query", lambda *a, **k: pytest.fail("pseudo-queries"))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    graph = graph_of(model)
    assert observe_task(model, graph, mo.TinyTrain(macs_fraction=1.0), SUPPORT).fisher
    few = net()
    seen = observe_task(few, graph_of(few), mo.SparseUpdate(biases=1), SUPPORT)
    assert seen.norms and not seen.fisher


# ---- the head ------------------------------------------------------------------------------------


def test_of_ways_shares_the_backbone_and_keeps_scale_and_bias():
    model = net()
    model.head.scale.fill_(7.0)
    model.head.bias.fill_(0.25)
    other = model.of_ways(5)
    assert other.backbone is model.backbone and not other.training
    assert other.head.prototypes.shape == (5, 32) and not other.head.prototypes.any()
    assert (float(other.head.scale), float(other.head.bias)) == (7.0, 0.25)
    with pytest.raises(UsageError, match="cosine head"):
        mo.FewShot(model.backbone, nn.Linear(32, 2)).of_ways(3)
