"""Lite residual modules: where they go, what they compute, and what TinyTL trains of them."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from cases import Fn, inverted, seq
from oracle import randomise
from torch import nn

import modicum as mo
from modicum.blocks import find_blocks
from modicum.errors import InvalidInput, UnsupportedOperator, UsageError
from modicum.lite import Lite, LiteResidual, StandardisedConv2d, norm_groups
from modicum.models import MODELS, load_weights

MODES = ("bias", "lite", "lite+bias")


def net(*blocks: nn.Module, channels: int = 6, out: int = 8) -> nn.Module:
    stem = seq(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 4))
    return seq(stem, seq(*blocks), *head).eval()


def image(h: int = 13, w: int = 11, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(5))


def two_blocks() -> nn.Module:
    torch.manual_seed(1)
    return net(inverted(6, 6), inverted(6, 8, 2))


# ---- the transformation ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(13, 11), (16, 16), (5, 5), (4, 3), (2, 2), (1, 1), (1, 9)])
def test_outputs_are_unchanged_at_first_for_any_size(size):
    torch.manual_seed(1)
    model = net(inverted(6, 6), inverted(6, 8, 2), inverted(8, 8, 2), inverted(8, 8))
    x = image(*size)
    lite = mo.add_lite_residuals(model, x)
    assert sum(isinstance(m, LiteResidual) for m in lite.modules()) == 4
    assert torch.equal(lite(x), model(x))
    mo.plan(mo.capture(lite, x), method=mo.TinyTL())


def test_the_model_itself_is_left_alone():
    model, before = two_blocks().train(), torch.random.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    lite = mo.add_lite_residuals(model, image())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training and all(m.training for m in lite.modules())
    assert not any(isinstance(m, LiteResidual) for m in model.modules())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (
        mo.add_lite_residuals(two_blocks(), image(), seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["1.0.body.lite.conv.weight"], other["1.0.body.lite.conv.weight"])


@pytest.mark.parametrize(
    ("shape", "stride", "pool", "kernel", "inner"),
    [
        ((6, 14, 14), 1, nn.AvgPool2d, 5, (7, 7)),
        ((6, 9, 8), 1, nn.AvgPool2d, 3, (4, 4)),
        ((6, 9, 8), 2, nn.AvgPool2d, 3, (2, 2)),
        ((6, 5, 4), 2, nn.AvgPool2d, 1, (1, 1)),
        ((6, 3, 2), 1, nn.AdaptiveAvgPool2d, 1, (1, 1)),
        ((6, 1, 1), 2, nn.AdaptiveAvgPool2d, 1, (1, 1)),
        ((6, 1, 8), 1, nn.AvgPool2d, 1, (1, 4)),
    ],
)
def test_the_kernel_shrinks_to_the_pooled_map(shape, stride, pool, kernel, inner):
    lite = Lite(shape, 8, (stride, stride), 5, 2, 8, True)
    assert isinstance(lite.pool, pool)
    assert lite.conv.kernel_size == (kernel, kernel) and lite.conv.groups == 2
    x = torch.randn(2, *shape)
    assert lite.conv(lite.pool(x)).shape[2:] == inner
    assert lite(x, torch.Size([7, 5])).shape == (2, 8, 7, 5)


def test_groups_and_norms_divide_the_channels():
    lite = Lite((9, 8, 8), 20, (1, 1), 3, 2, 8, True)
    assert lite.conv.groups == 1  # 2 and 9 share no divisor
    assert lite.norm.num_groups == 3 and lite.last_norm.num_groups == 4
    assert norm_groups(11, 8, 4) == 11 and norm_groups(11, 8, 1) == 1


def test_both_convolutions_are_standardised_unless_told_otherwise():
    def kinds(**more):
        lite = mo.add_lite_residuals(two_blocks(), image(), **more)
        return [type(lite.get_submodule(f"1.1.lite.{name}")) for name in ("conv", "mix")]

    assert kinds() == [StandardisedConv2d] * 2
    assert kinds(standardise=False) == [nn.Conv2d] * 2


def test_backbone_norms_become_group_norms_of_the_same_scale_and_shift():
    model = two_blocks()
    nn.init.normal_(model[0][1].weight)
    lite = mo.add_lite_residuals(model, image(), backbone_norm="group", norm_channels=3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in lite.modules())
    norm = lite[0][1]
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 2
    assert torch.equal(norm.weight, model[0][1].weight)
    assert isinstance(model[0][1], nn.BatchNorm2d)
    plan = mo.plan(mo.capture(lite, image()), method=mo.TinyTL())
    assert {n.op for n in plan.graph.nodes} >= {"group_norm", "resize"}


def test_blocks_in_modules_of_any_name_are_found():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(6, 12, 1)
            self.each = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.thin = nn.Conv2d(12, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.thin(torch.relu(self.each(torch.relu(self.wide(x)))))
            return x + y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.odd = nn.Conv2d(3, 6, 3), nn.ModuleDict({"only": Odd()})
            self.end = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.odd["only"](self.start(x)).mean([2, 3]))

    model, x = Net().eval(), image()
    lite = mo.add_lite_residuals(model, x)
    assert isinstance(lite.odd["only"], LiteResidual) and torch.equal(lite(x), model(x))
    names = [u.param for u in mo.TinyTL(mode="lite").select(mo.capture(lite, x)).updates]
    assert {n.rpartition(".")[0] for n in names} == {
        *(f"odd.only.lite.{part}" for part in ("conv", "norm", "mix", "last_norm")), "end"
    }  # fmt: skip


def test_paths_as_in_torchvision_are_replaced():
    """features.4.conv.0.0: the block's convolutions are in an inner module, the sum outside."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expand = seq(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
            each = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
            depthwise = seq(each, nn.BatchNorm2d(12), nn.ReLU6())
            project = (nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
            self.conv = seq(expand, depthwise, *project)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x)

    model = Fn(
        lambda m, x: m.classifier(m.features(x).mean([2, 3])),
        features=seq(nn.Conv2d(3, 6, 3), Block(), Block()),
        classifier=seq(nn.Dropout(0.2), nn.Linear(6, 4)),
    ).eval()
    x = image()
    assert [b.name for b in find_blocks(mo.capture(model, x))] == [
        "features.1.conv", "features.2.conv"
    ]  # fmt: skip
    lite = mo.add_lite_residuals(model, x)
    assert isinstance(lite.features[2].conv, LiteResidual)
    assert torch.equal(lite(x), model(x))
    assert "features.1.conv.main.0.0.weight" in lite.state_dict()


def test_blocks_of_a_model_with_lite_residuals_are_still_found():
    graph = mo.capture(mo.add_lite_residuals(two_blocks(), image()), image())
    assert [b.name for b in find_blocks(graph)] == ["1.0.body.main", "1.1.main"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (seq(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(396, 2)), "no inverted"),
        (seq(*inverted(3, 4, 2), nn.Flatten(), nn.Linear(168, 2)), "a module of its own"),
        (seq(seq(*inverted(3, 4, 2), nn.Sigmoid()), nn.Flatten(), nn.Linear(168, 2)),
         "its module also computes 0.8"),
        (Fn(lambda m, x: m.end(m.twice(m.twice(x)).mean([2, 3])), twice=inverted(3, 3),
            end=nn.Linear(3, 2)), "called more than once"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced_is_named(model, says):
    with pytest.raises(UsageError, match=says):
        mo.add_lite_residuals(model, image())


def test_only_tinytl_with_lite_modules_changes_the_model():
    model, x = two_blocks(), image()
    for method in (mo.Full(), mo.Bias(), mo.TinyTL(mode="bias")):
        assert mo.prepare_model(model, x, method) is model
    lite = mo.prepare_model(model, x, mo.TinyTL(kernel=3, groups=1, standardise=False))
    conv = lite.get_submodule("1.0.body.lite.conv")
    assert (type(conv), conv.kernel_size, conv.groups) == (nn.Conv2d, (3, 3), 1)
    assert mo.prepare_model(lite, x, mo.TinyTL()) is lite


# ---- the method ------------------------------------------------------------------------------


def chosen(mode: str, **more: object) -> set[str]:
    graph = mo.capture(mo.add_lite_residuals(two_blocks(), image()), image())
    return {u.param for u in mo.TinyTL(mode=mode, **more).select(graph).updates}


def test_each_mode_selects_its_parameters():
    bias, lite, both = (chosen(mode) for mode in MODES)
    head = {"4.weight", "4.bias"}
    assert head == bias & lite
    assert bias - head == {
        "0.1.bias", *(f"1.0.body.main.{i}.bias" for i in (1, 4, 7)),
        *(f"1.1.main.{i}.bias" for i in (1, 4, 7)),
    }  # fmt: skip
    assert lite - head == {
        f"1.{block}.lite.{name}"
        for block in ("0.body", "1")
        for name in ("conv.weight", "norm.weight", "norm.bias", "mix.weight",
                     "last_norm.weight", "last_norm.bias")
    }  # fmt: skip
    assert bias | lite == both | {"1.0.body.lite.last_norm.bias", "1.1.lite.last_norm.bias"}
    assert len(both) == len(bias | lite) - 2
    assert chosen("lite", head=0) == lite - head


@pytest.mark.parametrize("mode", ["lite", "lite+bias"])
def test_a_graph_without_lite_modules_is_refused_with_the_way_out(mode):
    graph = mo.capture(two_blocks(), image())
    with pytest.raises(UsageError, match="prepare_model"):
        mo.plan(graph, method=mo.TinyTL(mode=mode))


def test_a_plan_that_does_not_fit_proposes_less():
    assert mo.TinyTL(head=2).smaller() == mo.TinyTL(mode="bias", head=2)
    assert mo.TinyTL(mode="bias", head=2).smaller() == mo.Last(n=2)
    assert mo.TinyTL(mode="bias", head=0).smaller() is None


def test_lite_modules_keep_far_less_than_fine_tuning():
    """MobileNetV2 at 96 x 96: KiB kept for one sample."""
    entry, x = MODELS["mobilenet_v2"], torch.zeros(1, 3, 96, 96)
    torch.manual_seed(0)
    model = entry.make(10).eval()
    kib = {}
    for method in (mo.Full(), *(mo.TinyTL(mode=mode) for mode in MODES)):
        graph = mo.capture(mo.prepare_model(model, x, method), x)
        cost = mo.plan(graph, method=method).cost
        kib[getattr(method, "mode", "full")] = cost.saved / 1024
    print({mode: round(saved, 1) for mode, saved in kib.items()})
    assert kib["bias"] < kib["lite"] < kib["lite+bias"] < kib["full"] / 10


def test_a_plan_comes_back_from_its_file(tmp_path):
    """Attributes of resizing are floats, and stay so."""
    graph = mo.capture(mo.add_lite_residuals(two_blocks(), image()), image())
    plan = mo.plan(graph, method=mo.TinyTL(mode="lite"))
    plan.save(tmp_path / "plan.json")
    assert mo.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_loss(mode):
    method = mo.TinyTL(mode=mode)
    model = mo.prepare_model(randomise(two_blocks()), image(), method)
    plan = mo.plan(mo.capture(model, image()), method=method, optimizer=mo.Adam(lr=0.01))
    y = np.arange(12) % 4
    x = image(n=12).numpy() + np.eye(4, 3, dtype=np.float32)[y][:, :, None, None]
    trace = mo.adapt(model, plan, (x, y), epochs=20)
    assert np.mean(trace.losses[-12:]) < 0.7 * np.mean(trace.losses[:12])


# ---- the first blocks left out -----------------------------------------------------------------

BLOCKS = ("1.0.body", "1.1", "1.2.body", "1.3.body")


def four_blocks() -> nn.Module:
    torch.manual_seed(1)
    return net(inverted(6, 6), inverted(6, 8, 2), inverted(8, 8), inverted(8, 8))


def plan_of(model: nn.Module, **fields: object) -> mo.Plan:
    method = mo.TinyTL(**fields)
    return mo.plan(mo.capture(mo.prepare_model(model, image(), method), image()), method=method)


@pytest.mark.parametrize("mode", MODES)
def test_dropped_blocks_train_nothing_and_back_propagation_stops_behind_them(mode):
    plans = [plan_of(four_blocks(), mode=mode, drop=n / 4) for n in range(4)]
    for n, plan in enumerate(plans):
        names = [u.param for u in plan.selection.updates]
        trained = {block for block in BLOCKS if any(p.startswith(f"{block}.") for p in names)}
        assert trained == set(BLOCKS[n:])
        assert n == 0 or not any(p.startswith("0.") for p in names)  # the stem
        there = {p.split(".lite.")[0] for p in plan.graph.params if ".lite." in p}
        assert there == (set() if mode == "bias" else set(BLOCKS[n:]))
    for more, less in itertools.pairwise(plan.cost for plan in plans):
        assert less.macs_backward < more.macs_backward and less.saved < more.saved
        assert less.trained_params < more.trained_params


@pytest.mark.parametrize("mode", MODES)
def test_a_share_that_rounds_to_no_block_changes_nothing(mode):
    whole, none = (mo.TinyTL(mode=mode, drop=drop) for drop in (0.0, 0.12))
    a, b = (mo.prepare_model(four_blocks(), image(), method) for method in (whole, none))
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    graph = mo.capture(a, image())
    assert whole.select(graph) == none.select(graph)
    half = plan_of(four_blocks(), mode=mode, drop=0.125).selection  # rounds to one block
    assert len(half.updates) < len(whole.select(graph).updates)


@pytest.mark.parametrize("mode", MODES)
def test_when_all_blocks_are_dropped_the_head_is_left(mode):
    model = two_blocks()
    assert {u.param for u in plan_of(model, mode=mode, drop=0.75).selection.updates} == {
        "4.weight", "4.bias"
    }  # fmt: skip
    lite = mo.add_lite_residuals(model, image())
    method = mo.TinyTL(mode=mode, drop=0.75)
    names = {u.param for u in method.select(mo.capture(lite, image())).updates}
    assert names == {"4.weight", "4.bias"}


def test_lite_modules_that_are_there_are_not_trained_in_dropped_blocks():
    graph = mo.capture(mo.add_lite_residuals(two_blocks(), image()), image())
    names = {u.param for u in mo.TinyTL(mode="lite", drop=0.5).select(graph).updates}
    assert {n.partition(".lite.")[0] for n in names} == {"1.1", "4.weight", "4.bias"}


def test_a_dropped_block_need_not_be_a_module_of_its_own():
    model = seq(*inverted(3, 4, 2), seq(inverted(4, 4)), nn.Flatten(), nn.Linear(168, 2)).eval()
    with pytest.raises(UsageError, match="1 of 2 blocks cannot"):
        mo.add_lite_residuals(model, image())
    lite = mo.add_lite_residuals(model, image(), drop=0.5)
    assert torch.equal(lite(image()), model(image()))


def test_drop_needs_blocks_and_is_a_share_below_1():
    model = seq(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(396, 2)).eval()
    with pytest.raises(UsageError, match="no inverted residual blocks"):
        plan_of(model, mode="bias", drop=0.5)
    with pytest.raises(UsageError, match="from 0 to below 1"):
        mo.add_lite_residuals(two_blocks(), image(), drop=1.0)


# ---- weights of a net with lite modules --------------------------------------------------------


def test_weights_with_lite_modules_say_where_they_belong():
    plain = two_blocks()
    lite = mo.add_lite_residuals(plain, image())
    with pytest.raises(InvalidInput, match=r"prepare_model\(net, example, method\)"):
        load_weights(plain, lite.state_dict())
    with pytest.raises(InvalidInput, match="into the net first"):
        load_weights(lite, plain.state_dict())
    load_weights(mo.add_lite_residuals(plain, image(), seed=3), lite.state_dict())


# ---- standardised weights --------------------------------------------------------------------


def test_a_standardised_convolution_has_weights_of_mean_0_and_variance_1():
    layer, plain = StandardisedConv2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2)
    w = layer.weight.detach()
    var, mean = torch.var_mean(w, (1, 2, 3), correction=0, keepdim=True)
    plain.load_state_dict({"weight": (w - mean) / (var + 1e-5).sqrt(), "bias": layer.bias})
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(layer(x), plain(x), atol=1e-6)


def test_capture_makes_standardisation_an_attribute_of_the_convolution():
    (node,) = mo.capture(StandardisedConv2d(3, 4, 3), torch.zeros(1, 3, 6, 6)).nodes
    assert (node.op, node.params["weight"]) == ("conv2d", "weight")
    assert node.attrs["standardise"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (lambda m, x: m.c(nn.functional.layer_norm(x, x.shape[1:])), "only of a convolution's"),
        (lambda m, x: nn.functional.layer_norm(m.c(x), (4, 4, 4)), "only of a convolution's"),
        (lambda m, x: nn.functional.conv2d(
            x, nn.functional.layer_norm(m.c.weight, (3, 3)), m.c.bias), "per output channel"),
        (lambda m, x: nn.functional.conv2d(
            x, nn.functional.layer_norm(m.c.weight, (3, 3, 3), m.c.weight[0])), "scale and shift"),
        (lambda m, x: m.c(x) + nn.functional.layer_norm(m.c.weight, (3, 3, 3)).sum(),
         "not a convolution's weight|sum"),
    ],
)  # fmt: skip
def test_any_other_layer_norm_is_not_supported(norm, why):
    with pytest.raises(UnsupportedOperator, match=why):
        mo.capture(Fn(norm, c=nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 6, 6))
