"""Learning a task: against a plain PyTorch loop, and what it refuses."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import inverted, seq
from oracle import randomise
from pydantic import ValidationError
from torch import Tensor, nn

import modicum as mo
from modicum.errors import Diverged, InvalidInput, UsageError
from modicum.fewshot import FineTune, fine_tune, task_accuracy
from modicum.graph import Graph
from modicum.heads import FewShot, few_shot, linear_from_prototypes
from modicum.methods import SparseUpdate, TinyTrain
from modicum.observe import observe
from modicum.selection import Slice
from modicum.tasks import pseudo_query

STEPS = 5
WAYS = 3


def backbone() -> nn.Module:
    return seq(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6()),
        *(inverted(6, 6), inverted(6, 8, 2), nn.Conv2d(8, 7, 1), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)),
    )


@cache
def models(head: str) -> tuple[nn.Module, Graph]:
    model = randomise(backbone(), seed=3)
    few = few_shot(model, WAYS, scale=8.0, bias=0.1).eval()
    if head == "linear":
        with torch.no_grad():
            features = few.backbone(torch.from_numpy(SUPPORT[0]))
        few.head.refresh(features, torch.from_numpy(SUPPORT[1]))
        few = FewShot(few.backbone, linear_from_prototypes(few.head.prototypes)).eval()
    return few, mo.capture(few, torch.zeros(1, 3, 8, 8))


def images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of classes that can be told apart: each has a pattern."""
    pattern = np.random.default_rng(99).normal(size=(WAYS, 3, 8, 8))
    y = np.arange(n) % WAYS
    x = pattern[y] + 0.7 * np.random.default_rng(seed).normal(size=(n, 3, 8, 8))
    return x.astype(np.float32), y


SUPPORT, QUERY = images(9, 0), images(30, 1)


def plan(method: mo.methods.Method, head: str = "cosine", **more: object) -> mo.Plan:
    model, graph = models(head)
    seen = None
    if isinstance(method, TinyTrain | SparseUpdate):
        seen = observe(model, graph, method, SUPPORT)
    return mo.plan(graph, None, method, more.get("optimizer", mo.Adam(lr=0.01)), samples=seen)


# ---- the same as a plain loop ----------------------------------------------------------------


def plain_loop(
    model: nn.Module, made: mo.Plan, config: FineTune, seed: int, queries: np.ndarray | None
) -> tuple[nn.Module, list[float], Tensor | None]:
    """Dense gradients of the whole model, zeroed outside of what is selected."""
    net = copy.deepcopy(model).eval()
    params = dict(net.named_parameters())
    masks = {}
    for u in made.selection.updates:
        masks[u.param] = mask = torch.zeros_like(params[u.param])
        rows = list(range(mask.shape[0])) if u.slice.out is None else list(u.slice.out)
        for r in rows:
            mask[r] = 1
        if u.slice.inp is not None:
            outside = [i for i in range(mask.shape[1]) if i not in u.slice.inp]
            mask[:, outside] = 0
    o = made.optimizer
    if isinstance(o, mo.Adam):
        optimizer = torch.optim.Adam([params[n] for n in masks], o.lr)
    else:
        optimizer = torch.optim.SGD([params[n] for n in masks], o.lr, momentum=o.momentum)
    x, y = torch.from_numpy(SUPPORT[0]), torch.from_numpy(SUPPORT[1])

    def prototypes() -> Tensor:
        features = net.backbone(x)
        return torch.stack([features[y == k].mean(0) for k in range(WAYS)])

    moving = config.prototypes == "moving"
    with_head = made.graph.nodes[-1].op == "cosine"
    with torch.no_grad():
        fixed = prototypes()
    losses = []
    for step in range(config.iterations):
        z = torch.from_numpy(pseudo_query(SUPPORT[0], config, seed=seed, step=step))
        if with_head:
            if config.prototypes != "fixed":
                with torch.set_grad_enabled(moving):
                    c = prototypes()
            else:
                c = fixed

            def outputs(images: Tensor, c: Tensor = c if with_head else x) -> Tensor:
                f = net.backbone(images)
                return 8.0 * (F.cosine_similarity(f[:, None], c[None], dim=-1) + 0.1)
        else:
            outputs = net
        loss = F.cross_entropy(outputs(z), y)
        if config.entropy:
            p = outputs(torch.from_numpy(queries)).softmax(1)
            loss = loss + config.entropy * -(p * p.log()).sum(1).mean()
        losses.append(float(loss))
        net.zero_grad()
        loss.backward()
        for name, mask in masks.items():
            params[name].grad *= mask
        optimizer.step()
    with torch.no_grad():
        last = fixed if config.prototypes == "fixed" else prototypes()
    return net, losses, last if with_head else None


PARTS = {
    "0.weight": {"out": (0, 4)},
    "3.body.3.weight": {"out": (1, 2, 11)},
    "4.0.weight": {"inp": (0, 5)},
    "5.weight": {"out": (0, 6), "inp": (2, 3, 7)},
    "3.body.7.bias": None,
}
METHODS = {
    "everything": mo.Full(),
    "slices": mo.Explicit(params={f"backbone.{k}": v for k, v in PARTS.items()}),
    "tinytrain": TinyTrain(ram="64KiB", macs_fraction=0.6, bias=True),
    "tinytrain in": TinyTrain(ram="64KiB", macs_fraction=0.6, axis="in"),
    "sparse update": SparseUpdate(biases=4, weights={"5": 0.5, "6": 0.25}),
    "the last": mo.Last(n=1),
    "biases": mo.Bias(head=0),
}


def agree(
    made: mo.Plan, head: str, config: FineTune, seed: int = 0, queries: np.ndarray | None = None
) -> None:
    model, _ = models(head)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned, learned = fine_tune(model, made, SUPPORT, config, seed=seed, queries=queries)
    net, losses, prototypes = plain_loop(model, made, config, seed, queries)
    assert learned.losses == pytest.approx(losses, rel=1e-4)
    after = {n: p.clone() for n, p in before.items()}
    after |= {n: t for n, t in tuned.learned().items() if n in before}
    slices = {u.param: u.slice for u in made.selection.updates}
    moved = 0.0
    for name, want in net.named_parameters():
        assert (after[name] - want).abs().max() < 1e-5, name
        if name not in slices:
            assert torch.equal(after[name], before[name]), name
            continue
        assert torch.equal(*(outside(t, slices[name]) for t in (after[name], before[name])))
        moved = max(moved, float((after[name] - before[name]).abs().max()))
    assert moved > 1e-3 or not config.iterations
    if prototypes is not None:
        assert torch.allclose(tuned.head()[0], prototypes, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def outside(t: Tensor, s: Slice) -> Tensor:
    """Zero in the slice."""
    t = t.clone()
    rows = torch.arange(t.shape[0]) if s.out is None else torch.tensor(s.out)
    if s.inp is None:
        t[rows] = 0
    else:
        t[rows[:, None], torch.tensor(s.inp)] = 0
    return t


@pytest.mark.parametrize("prototypes", ["moving", "refreshed", "fixed"])
@pytest.mark.parametrize("name", METHODS)
def test_fine_tuning_is_a_plain_loop_with_masked_gradients(name, prototypes):
    config = FineTune(iterations=STEPS, prototypes=prototypes)
    agree(plan(METHODS[name]), "cosine", config, seed=len(name))


@pytest.mark.parametrize("name", ["everything", "slices", "the last"])
def test_a_linear_head_learns_the_pseudo_queries_themselves(name):
    made = plan(METHODS[name], "linear")
    agree(made, "linear", FineTune(iterations=STEPS))


@pytest.mark.parametrize(("head", "prototypes"), [
    ("cosine", "moving"), ("cosine", "refreshed"), ("cosine", "fixed"), ("linear", "moving"),
])  # fmt: skip
def test_transductive_fine_tuning_adds_the_mean_entropy_of_the_queries(head, prototypes):
    config = FineTune(iterations=STEPS, prototypes=prototypes, entropy=0.7)
    agree(plan(METHODS["slices"], head), head, config, queries=QUERY[0])


@pytest.mark.parametrize("prototypes", ["moving", "refreshed"])
def test_prototypes_are_embedded_as_queries_are_where_norms_follow_the_batch(prototypes):
    model, _ = models("cosine")
    made = plan(mo.Full(norms="batch"), optimizer=mo.SGD(lr=0.0))
    config = FineTune(iterations=2, prototypes=prototypes)
    tuned, _ = fine_tune(model, made, SUPPORT, config)
    followed = copy.deepcopy(model)
    tuned.write_to(followed)
    name = "backbone.1.running_mean"
    assert not torch.equal(followed.get_buffer(name), model.get_buffer(name))
    with torch.no_grad():
        features = followed.backbone(torch.from_numpy(SUPPORT[0]))
    means = torch.stack([features[SUPPORT[1] == k].mean(0) for k in range(WAYS)])
    assert torch.allclose(tuned.head()[0], means, atol=1e-5)
    before = {n: t.clone() for n, t in tuned.learned().items()}
    tuned.refresh(*(torch.from_numpy(a) for a in SUPPORT))
    assert tuned.training
    assert all(torch.equal(t, before[n]) for n, t in tuned.learned().items() if "running" in n)


def test_the_optimiser_is_the_plans():
    made = plan(METHODS["slices"], optimizer=mo.SGD(lr=0.05, momentum=0.9))
    agree(made, "cosine", FineTune(iterations=STEPS))


def test_augmentation_follows_the_config_and_the_seed():
    made = plan(METHODS["slices"])
    config = FineTune(iterations=STEPS, probability=0.5, colour=False, translate=0.25)
    agree(made, "cosine", config, seed=11)
    model, _ = models("cosine")
    same = [fine_tune(model, made, SUPPORT, config, seed=s)[1].losses for s in (11, 11, 12)]
    assert same[0] == same[1] != same[2]


def test_a_task_is_learned():
    model, _ = models("cosine")
    made = plan(METHODS["everything"])
    nothing, _ = fine_tune(model, made, SUPPORT, FineTune(iterations=0))
    tuned, learned = fine_tune(model, made, SUPPORT, FineTune(iterations=30, probability=0.2))
    before, after = task_accuracy(nothing, QUERY), task_accuracy(tuned, QUERY)
    assert learned.losses[-1] < 0.5 * learned.losses[0] and learned.seconds > 0
    assert after > 0.8 and after >= before


def test_no_iterations_give_the_prototypes_alone():
    model, _ = models("cosine")
    seen = []
    tuned, learned = fine_tune(
        model, plan(METHODS["slices"]), SUPPORT, FineTune(iterations=0), on_step=seen.append
    )
    assert learned.losses == [] == seen
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(SUPPORT[0]))
    means = torch.stack([features[SUPPORT[1] == k].mean(0) for k in range(WAYS)])
    assert torch.allclose(tuned.head()[0], means, atol=1e-5)


def test_every_step_is_told():
    steps: list[tuple[int, float]] = []
    model, _ = models("cosine")
    _, learned = fine_tune(
        model,
        plan(METHODS["the last"]),
        SUPPORT,
        FineTune(iterations=3),
        on_step=lambda i, loss: steps.append((i, loss)),
    )
    assert steps == list(enumerate(learned.losses))


def test_queries_need_not_be_of_every_class_and_a_class_may_have_one_sample():
    model, _ = models("cosine")
    one = SUPPORT[0][:WAYS], SUPPORT[1][:WAYS]
    config = FineTune(iterations=2, entropy=0.5)
    two = QUERY[0][QUERY[1] < 2], QUERY[1][QUERY[1] < 2]
    tuned, learned = fine_tune(model, plan(METHODS["slices"]), one, config, queries=two[0])
    assert np.isfinite(learned.losses).all()
    logits = tuned.eval()(torch.from_numpy(two[0]))
    assert task_accuracy(tuned, two) == float((logits.argmax(1).numpy() == two[1]).mean())


def test_lists_and_doubles_are_taken_as_arrays_are():
    model, _ = models("cosine")
    made, config = plan(METHODS["slices"]), FineTune(iterations=2, entropy=0.5)
    want = fine_tune(model, made, SUPPORT, config, queries=QUERY[0])[1].losses
    wide = SUPPORT[0].astype(np.float64).tolist(), SUPPORT[1].tolist()
    got = fine_tune(model, made, wide, config, queries=QUERY[0].astype(np.float64))[1].losses
    tensors = tuple(torch.from_numpy(a) for a in SUPPORT)
    assert got == want == fine_tune(model, made, tensors, config, queries=QUERY[0])[1].losses


# ---- bad input -------------------------------------------------------------------------------


def _wrong() -> dict[str, tuple[object, object, str]]:
    x, y = SUPPORT
    broken = x.copy()
    broken[4, 2, 0, 0] = np.inf
    return {
        "one class alone": (x, 0 * y, "samples of each of 3 classes"),
        "a class missing": (x[y < 2], y[y < 2], "samples of each of 3 classes"),
        "another size": (x[:, :, :6, :6], y, "the inputs have shape"),
        "one channel": (x[:, :1], y, "the inputs have shape"),
        "labels too large": (x, y + 1, "labels must be whole numbers from 0 to 2"),
        "negative labels": (x, y - 1, "labels must be whole numbers from 0 to 2"),
        "labels with a fraction": (x, y + 0.5, "labels must be whole numbers from 0 to 2"),
        "too many labels": (x, np.append(y, 0), "9 inputs but labels of shape"),
        "not finite": (broken, y, "input 4 has values that are not finite"),
        "nothing": (x[:0], y[:0], "there are no samples"),
        "words": (["a"] * 9, y, "not arrays of numbers"),
    }


WRONG = _wrong()


@pytest.mark.parametrize("head", ["cosine", "linear"])
@pytest.mark.parametrize("which", WRONG)
def test_a_support_set_that_cannot_be_learned_is_refused(which, head):
    x, y, message = WRONG[which]
    model, _ = models(head)
    if head == "linear" and "samples of each" in message:
        fine_tune(model, plan(METHODS["the last"], head), (x, y), FineTune(iterations=1))
        return  # a linear head has no prototypes to miss
    with pytest.raises((InvalidInput, UsageError), match=message):
        fine_tune(model, plan(METHODS["the last"], head), (x, y), FineTune(iterations=1))


def test_the_entropy_needs_queries_that_the_model_takes():
    model, _ = models("cosine")
    made, config = plan(METHODS["the last"]), FineTune(iterations=1, entropy=1.0)
    with pytest.raises(UsageError, match="the entropy of what queries"):
        fine_tune(model, made, SUPPORT, config)
    for queries, message in (
        (QUERY[0][:0], "there are no samples"),
        (QUERY[0][:, :, 1:], "the inputs have shape"),
        (QUERY[0] * np.nan, "not finite"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fine_tune(model, made, SUPPORT, config, queries=queries)


def test_a_rate_that_is_too_large_is_told_from_a_result():
    model, _ = models("linear")
    made = plan(METHODS["everything"], "linear", optimizer=mo.SGD(lr=1e12))
    with pytest.raises(Diverged, match="not finite in step") as error:
        fine_tune(model, made, SUPPORT, FineTune(iterations=10))
    assert "a smaller learning rate" in str(error.value)


def test_vectors_have_no_pseudo_queries():
    model = few_shot(seq(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), 2)
    made = mo.plan(mo.capture(model, torch.zeros(1, 4)), method=mo.Full())
    with pytest.raises(UsageError, match="images have shape"):
        fine_tune(model, made, (np.ones((2, 4)), [0, 1]), FineTune(iterations=1))


@pytest.mark.parametrize(
    "fields",
    [{"iterations": -1}, {"prototypes": "still"}, {"entropy": -0.5}, {"entropy": float("inf")}],
)
def test_a_config_out_of_range_is_refused(fields):
    with pytest.raises(ValidationError):
        FineTune(**fields)


def test_a_plan_for_another_model_is_refused():
    few, _ = models("cosine")
    other = few_shot(seq(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), WAYS)
    with pytest.raises(InvalidInput):
        fine_tune(other, plan(METHODS["the last"]), SUPPORT, FineTune(iterations=1))
    five = few.of_ways(5)
    made = mo.plan(mo.capture(five, torch.zeros(1, 3, 8, 8)), method=mo.Last(n=1))
    with pytest.raises(UsageError, match="samples of each of 5 classes"):
        fine_tune(five, made, SUPPORT, FineTune(iterations=1))
