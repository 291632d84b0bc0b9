"""SparseUpdate: the published schemes on the nets they are for, and schemes of one's own."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import seq
from oracle import randomise
from pydantic import ValidationError
from torch import nn

import modicum as mo
from modicum.errors import UsageError
from modicum.graph import Graph
from modicum.heads import few_shot
from modicum.methods import Observed, SparseUpdate
from modicum.methods.sparse_update import SCHEMES
from modicum.models import MODELS
from modicum.observe import observe
from modicum.selection import Selection, Update

NETS = {"mcunet": "mcunet-5fps", "mbv2": "mbv2-w0.35", "proxyless": "proxyless-w0.3"}
LAST = ("mcunet-99kb", "mbv2-138kb", "proxyless-148kb")


@cache
def backbone(net: str) -> tuple[nn.Module, Graph, list[str]]:
    """A few-shot model, its graph, and the names of its convolutions in order."""
    entry = MODELS[NETS[net]]
    torch.manual_seed(0)
    model = few_shot(entry.make(2), 5)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return model, mo.capture(model, torch.zeros(entry.input)), convs


def select(net: str, **fields: object) -> tuple[dict[str, Update], list[str]]:
    model, graph, convs = backbone(net)
    method = SparseUpdate(**fields)
    plan = mo.plan(graph, method=method, samples=observe(model, graph, method))
    return {u.param: u for u in plan.selection.updates}, convs


# ---- published schemes -----------------------------------------------------------------------

# as the authors' code has them: the last k biases, convolutions and shares of input channels
PUBLISHED = {
    "mcunet-49kb": (20, "23 24 27 30 33 39", "0 1/4 1/2 1/2 0 0"),
    "mcunet-74kb": (21, "21 23 24 26 27 30", "1 0 1 0 1/2 1"),
    "mcunet-99kb": (22, "21 24 27 30 36 39", "1 1 1 1 1/8 1/4"),
    "mcunet-124kb": (24, "21 24 27 30 33 39", "1/4 1 1 1 1/2 1/2"),
    "mcunet-148kb": (23, "21 24 27 30 36 39", "1 1 1 1 1 1/2"),
    "mbv2-49kb": (16, "36 39 40 41 42 45 48 49", "1 1 0 1/4 1/8 1/8 1/8 1/8"),
    "mbv2-73kb": (20, "32 33 36 39 41 42 45 48", "1/8 1/2 1/2 1 1/4 1/8 1/8 1"),
    "mbv2-99kb": (25, "27 30 33 36 39 42 45 48", "1 1 1 1 1 1/8 1/2 1"),
    "mbv2-123kb": (31, "27 30 33 36 39 42 45 48", "1 1 1 1 1 1/2 1 1"),
    "mbv2-138kb": (34, "27 30 33 36 39 42 45 48", "1 1 1 1 1 1 1 1"),
    "proxyless-49kb": (21, "39 42 44 45 50 51 54 57", "1/4 1 0 1 0 1/8 1/4 1/4"),
    "proxyless-74kb": (28, "33 36 39 42 45 51 54 57", "1/2 1/4 1 1 1 1/2 1/4 1/2"),
    "proxyless-98kb": (25, "36 39 42 45 48 51 54 57", "1 1/2 1 1 1/4 1/2 1 1"),
    "proxyless-120kb": (32, "36 39 42 45 48 51 54 57", "1 1 1 1 1/2 1 1 1"),
    "proxyless-148kb": (45, "36 39 42 45 48 51 54 57", "1 1 1 1 1 1 1 1"),
}  # fmt: skip


def test_all_published_schemes_are_there():
    assert set(SCHEMES) == set(PUBLISHED)


@pytest.mark.parametrize("scheme", PUBLISHED)
def test_a_published_scheme_selects_its_biases_and_the_largest_input_channels(scheme):
    net = scheme.partition("-")[0]
    model, _, _ = backbone(net)
    updates, convs = select(net, scheme=scheme)
    k, numbers, shares = PUBLISHED[scheme]
    want: dict[str, tuple[int, ...] | None] = {f"{name}.bias": None for name in convs[-k:]}
    for number, share in zip(numbers.split(), shares.split(), strict=True):
        weight = model.get_submodule(convs[int(number)]).weight
        up, _, down = share.partition("/")
        depthwise = weight.shape[1] == 1
        norms = weight.square().sum((1, 2, 3) if depthwise else (0, 2, 3))
        if count := round(len(norms) * int(up) / int(down or 1)):
            largest = sorted(norms.topk(count).indices.tolist())
            want[f"{convs[int(number)]}.weight"] = tuple(largest)
            side = "out" if depthwise else "inp"
            got = getattr(updates[f"{convs[int(number)]}.weight"].slice, side)
            assert got == tuple(largest)
    assert set(updates) == set(want)
    assert all(updates[name].slice.whole for name in want if name.endswith(".bias"))


def test_mcunets_99_kb_scheme_has_52480_weights_and_as_many_biases_as_channels():
    updates, convs = select("mcunet", scheme="mcunet-99kb")
    model, graph, _ = backbone("mcunet")
    shapes = {n: u.slice.shape(graph.params[n].shape) for n, u in updates.items()}
    weights = [torch.Size(s).numel() for n, s in shapes.items() if n.endswith(".weight")]
    biases = [torch.Size(s).numel() for n, s in shapes.items() if n.endswith(".bias")]
    assert sum(weights) == 52_480
    assert sum(biases) == sum(model.get_submodule(c).out_channels for c in convs[-22:])
    selection = Selection(updates=tuple(updates.values()))
    cost = mo.backward_cost(graph, selection, mo.Adam())
    assert cost.updated == sum(weights) + sum(biases)
    # without the biases the paper's 1.43 MiB: 0.20 + 0.60 + 0.63
    alone = selection.updates
    alone = tuple(u for u in alone if u.param.endswith(".weight"))
    without = mo.backward_cost(graph, Selection(updates=alone), mo.Adam())
    assert without.memory / 2**20 == pytest.approx(1.43, abs=0.005)
    assert cost.macs == pytest.approx(11.9e6, rel=0.04)


def test_leading_channels_are_the_first():
    updates, convs = select("mcunet", scheme="mcunet-99kb", channels="leading")
    for number, share in ((36, 8), (39, 4)):
        few = backbone("mcunet")[0].get_submodule(convs[number]).in_channels // share
        assert updates[f"{convs[number]}.weight"].slice.inp == tuple(range(few))


def test_a_scheme_for_another_net_is_refused():
    for scheme in LAST:
        for net in NETS:
            if not scheme.startswith(net):
                with pytest.raises(UsageError, match=f"the scheme {scheme} is for") as error:
                    select(net, scheme=scheme)
                assert f"the model has {len(backbone(net)[2])}" in str(error.value)


# ---- costs as the papers count them ----------------------------------------------------------


@pytest.mark.parametrize(("net", "kib"), [("mcunet", 640), ("mbv2", 896), ("proxyless", 512)])
def test_the_largest_input_and_output_of_a_layer_are_the_papers(net, kib):
    _, graph, convs = backbone(net)
    last = Selection(updates=(Update(param=f"{convs[-1]}.weight"),))
    assert mo.backward_cost(graph, last, mo.Adam()).io == kib * 1024


@pytest.mark.parametrize(("net", "mib"), [("mcunet", 2.03), ("proxyless", 1.06)])
def test_training_the_last_convolution_with_adam_takes_what_the_papers_say(net, mib):
    _, graph, convs = backbone(net)
    last = Selection(updates=(Update(param=f"{convs[-1]}.weight"),))
    cost = mo.backward_cost(graph, last, mo.Adam())
    assert cost.memory / 2**20 == pytest.approx(mib, abs=0.005)
    assert cost.saved < cost.io == cost.activation
    sgd = mo.backward_cost(graph, last, mo.SGD())
    assert cost.memory - sgd.memory == 8 * cost.updated  # two states of four bytes
    if net == "mcunet":
        table = (cost.weights, cost.optimizer, cost.activation, sgd.memory)
        # the paper's Table 7, in MiB
        assert [n / 2**20 for n in table] == pytest.approx([0.35, 1.05, 0.63, 1.33], abs=0.01)


# ---- schemes of one's own --------------------------------------------------------------------


@cache
def small() -> tuple[nn.Module, Graph]:
    """Layers 0 (3 to 8), 1 (8, depthwise), 2 (8 to 6), 3 (linear, 54 to 5), and a classifier."""
    model = randomise(seq(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False)),
        *(nn.Flatten(), nn.Linear(54, 5), nn.ReLU(), nn.Linear(5, 4)),
    ))  # fmt: skip
    return model, mo.capture(model, torch.zeros(1, 3, 5, 5))


def of_small(**fields: object) -> dict[str, Update]:
    model, graph = small()
    method = SparseUpdate(**fields)
    plan = mo.plan(graph, method=method, samples=observe(model, graph, method))
    return {u.param: u for u in plan.selection.updates}


HEAD = {"9.weight", "9.bias"}


def test_layers_go_by_number_or_by_pattern_and_the_classifier_is_always_trained():
    model, _ = small()
    by_number = of_small(weights={"2": 0.5})
    assert by_number == of_small(weights={"5.w*": 0.5})
    assert set(by_number) == HEAD | {"5.weight"}
    best = model[5].weight.square().sum((0, 2, 3)).topk(4).indices
    assert by_number["5.weight"].slice.inp == tuple(sorted(best.tolist()))
    assert by_number["9.weight"].slice.whole


def test_biases_are_those_of_convolutions_or_of_the_norms_after_them():
    assert set(of_small(biases=1)) == HEAD | {"7.bias"}
    assert set(of_small(biases=2)) == HEAD | {"7.bias"}  # the 1x1 convolution has none
    assert set(of_small(biases=4)) == HEAD | {"7.bias", "3.bias", "1.bias"}


def test_of_a_depthwise_layer_either_axis_is_its_channels():
    model, _ = small()
    best = tuple(sorted(model[3].weight.square().sum((1, 2, 3)).topk(2).indices.tolist()))
    for axis in ("in", "out"):
        s = of_small(weights={"1": 0.25}, axis=axis)["3.weight"].slice
        assert (s.out, s.inp) == (best, None)


def test_output_channels_are_sliced_on_request():
    model, _ = small()
    s = of_small(weights={"0": 0.25, "3": 0.4}, axis="out")
    assert s["0.weight"].slice.out == tuple(
        sorted(model[0].weight.square().sum((1, 2, 3)).topk(2).indices.tolist())
    )
    assert len(s["7.weight"].slice.out) == 2


def test_a_share_of_nothing_trains_no_weight_and_of_all_the_whole_weight():
    nothing = of_small(biases=1, weights={"0": 0.0, "2": 1.0})
    assert set(nothing) == HEAD | {"7.bias", "5.weight"}
    assert nothing["5.weight"].slice.inp == tuple(range(8))


def test_wrong_schemes_are_refused_with_what_there_is():
    with pytest.raises(ValidationError, match="no scheme is called 'mcunet-1kb': mcunet-49kb"):
        SparseUpdate(scheme="mcunet-1kb")
    for fields in ({}, {"scheme": "mcunet-99kb", "biases": 3}, {"weights": {}}):
        with pytest.raises(ValidationError, match="either a scheme, or biases and weights"):
            SparseUpdate(**fields)
    for share in (-0.1, 1.5):
        with pytest.raises(ValidationError):
            SparseUpdate(weights={"0": share})


@pytest.mark.parametrize("key", ["4", "-1", "conv.weight", "7.bias", "1.weight"])
def test_a_layer_that_is_not_there_is_refused_with_how_to_name_one(key):
    with pytest.raises(UsageError, match=f"no layer is '{key}'") as error:
        of_small(weights={key: 0.5})
    assert "a number from 0 to 3, or a name like 0.weight" in str(error.value)


def test_more_biases_than_layers_and_a_model_without_layers_are_refused():
    with pytest.raises(UsageError, match="the model has 4 layers, not 5"):
        of_small(biases=5)
    model = nn.Linear(3, 2)
    graph = mo.capture(model, torch.zeros(1, 3))
    method = SparseUpdate(weights={"0": 1.0})
    with pytest.raises(UsageError, match="no convolution or linear layer before its output"):
        mo.plan(graph, method=method, samples=observe(model, graph, method))


def test_channels_by_norm_need_the_weights_to_be_seen():
    _, graph = small()
    with pytest.raises(UsageError, match="SparseUpdate has to see the weights before it selects"):
        mo.plan(graph, method=SparseUpdate(weights={"2": 0.5}))
    with pytest.raises(UsageError, match=r"no norms of 5\.weight were observed"):
        mo.plan(graph, method=SparseUpdate(weights={"2": 0.5}), samples=Observed())
