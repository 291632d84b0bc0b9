"""Capture: what it reads, what it refuses, and that the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import NETS, Fn, captured, seq
from oracle import GraphModel
from torch import nn

import modicum as mo
from modicum.capture import check_model
from modicum.errors import InvalidInput, UnsupportedOperator, UsageError

IMAGE = (1, 3, 6, 6)


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


def ops(forward, shape=IMAGE, **layers: nn.Module) -> list[str]:
    graph = mo.capture(Fn(forward, **layers), torch.zeros(shape))
    return [node.op for node in graph.nodes]


# ---- what it reads ---------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_a_captured_graph_computes_what_the_model_computes(net):
    model, graph = captured(net)
    twin = GraphModel(graph).double().eval()
    state = {k: v.double() for k, v in model.state_dict().items()}
    twin.load_state_dict({k: state[k] for k in twin.state_dict()})
    x = torch.randn(2, *NETS[net].shape, generator=torch.Generator().manual_seed(3))
    want = model(x).double()
    assert torch.allclose(twin(x.double()), want, atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda m, x: m.c(x).relu(), ["conv2d", "clamp"]),
        (lambda m, x: F.relu_(m.c(x)), ["conv2d", "clamp"]),
        (lambda m, x: m.c(x).clamp(min=0), ["conv2d", "clamp"]),
        (lambda m, x: m.c(x).clamp_(-2, 2.5), ["conv2d", "clamp"]),
        (lambda m, x: F.hardtanh(m.c(x)), ["conv2d", "clamp"]),
        (lambda m, x: m.c(x).mean((2, 3)), ["conv2d", "adaptive_avg_pool2d", "reshape"]),
        (lambda m, x: m.c(x).mean((-1, -2), keepdim=True), ["conv2d", "adaptive_avg_pool2d"]),
        (lambda m, x: F.avg_pool2d(m.c(x), 4).squeeze(-1).squeeze(-1),
         ["conv2d", "avg_pool2d", "reshape", "reshape"]),
        (lambda m, x: m.c(x).view(x.size(0), -1), ["conv2d", "reshape"]),
        (lambda m, x: m.c(x).reshape(len(x), 4, -1), ["conv2d", "reshape"]),
        (lambda m, x: m.c(x).flatten(1).unsqueeze(1), ["conv2d", "reshape", "reshape"]),
        (lambda m, x: m.c(F.pad(x, (1, 0, 0, 2))), ["conv2d"]),
        (lambda m, x: m.c(x).add_(m.c(x)), ["conv2d", "conv2d", "add"]),
        (lambda m, x: torch.cat([m.c(x), m.c(x)], -1), ["conv2d", "conv2d", "concat"]),
        (lambda m, x: F.dropout(m.c(x), training=m.training), ["conv2d"]),
        (lambda m, x: m.c(x).contiguous().clone(), ["conv2d"]),
    ],
)  # fmt: skip
def test_an_operator_is_known_in_every_spelling(forward, found):
    assert ops(forward, c=conv()) == found


@pytest.mark.parametrize(
    "layer", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.Identity()], ids=repr
)
def test_dropout_and_identity_are_gone(layer):
    assert ops(lambda m, x: m.d(m.c(x)), c=conv(), d=layer) == ["conv2d"]


def test_a_convolution_keeps_all_its_attributes():
    layer = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2)
    (node,) = mo.capture(layer, torch.zeros(1, 4, 9, 9)).nodes
    assert node.attrs == {
        "stride": (1, 2), "padding": (1, 0, 1, 0), "dilation": (2, 1), "groups": 2
    }  # fmt: skip


def test_same_padding_of_an_even_kernel_puts_the_odd_row_at_the_end():
    (node,) = mo.capture(nn.Conv2d(3, 4, (2, 4), padding="same"), torch.zeros(IMAGE)).nodes
    assert node.attrs["padding"] == (0, 1, 1, 2)


@pytest.mark.parametrize(
    ("lo", "hi", "bounds"),
    [(-math.inf, 2.0, (None, 2.0)), (0, math.inf, (0.0, None)), (-1, 1, (-1.0, 1.0))],
)
def test_a_clamp_without_a_bound_on_one_side_has_none_there(lo, hi, bounds):
    graph = mo.capture(Fn(lambda m, x: m.c(x).clamp(lo, hi), c=conv()), torch.zeros(IMAGE))
    attrs = graph.nodes[-1].attrs
    assert (attrs["lo"], attrs["hi"]) == bounds


def test_padding_before_a_convolution_adds_to_its_own():
    model = Fn(lambda m, x: m.c(F.pad(x, (1, 2, 3, 4))), c=nn.Conv2d(3, 4, 3, padding=1))
    graph = mo.capture(model, torch.zeros(IMAGE))
    assert graph.nodes[0].attrs["padding"] == (4, 2, 5, 3)


def test_nodes_are_named_after_their_modules_and_parameters_as_in_the_state_dict():
    model, graph = captured("mobile")
    assert {"stem.0", "block.3", "head"} <= set(graph.by_name)
    assert graph.trainable() == [name for name, _ in model.named_parameters()]
    assert not graph.params["stem.1.running_mean"].trainable


def test_only_the_first_sample_of_an_example_counts():
    model, graph = captured("mobile")
    assert mo.capture(model, torch.zeros(7, 3, 9, 8)).hash == graph.hash


def test_the_hash_is_of_the_structure_and_not_of_the_weights():
    a, b, c = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 3)
    hashes = [mo.capture(m, torch.zeros(1, 4)).hash for m in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_the_output_does_not_need_is_left_out():
    def forward(m, x):
        m.unused(x)
        return m.c(x)

    graph = mo.capture(Fn(forward, c=conv(), unused=conv()), torch.zeros(IMAGE))
    assert list(graph.by_name) == ["c"] and set(graph.params) == {"c.weight", "c.bias"}


# ---- what it refuses -------------------------------------------------------------------------


def test_all_unsupported_operators_are_listed_at_once_with_their_modules():
    model = seq(
        nn.Conv2d(3, 4, 3), nn.Tanh(), seq(nn.Conv2d(4, 4, 1), nn.GELU()),
        nn.ConvTranspose2d(4, 2, 2), nn.LayerNorm(5), nn.Softmax(1),
    )  # fmt: skip
    with pytest.raises(UnsupportedOperator, match="5 operators") as caught:
        mo.capture(model, torch.zeros(IMAGE))
    assert caught.value.exit_code == 4
    listed = caught.value.details["where"]
    assert [line.split(":")[0] for line in listed] == ["1", "2.1", "3", "4", "5"]
    for line, name in zip(
        listed, ["tanh", "gelu", "conv_transpose2d", "layer_norm", "softmax"], strict=True
    ):
        assert name in line


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.c(x) + 1, "a constant operand"),
        (lambda m, x: torch.add(m.c(x), m.c(x), alpha=2), "only a plain sum"),
        (lambda m, x: m.c(x) + m.c(x).mean((2, 3), keepdim=True), "adds values of one shape"),
        (lambda m, x: m.c(x).mean(1), "only the mean over height and width"),
        (lambda m, x: m.c(x).mean(), "only the mean over height and width"),
        (lambda m, x: m.c(x).view(4, -1), "mixes the batch dimension"),
        (lambda m, x: torch.cat([m.c(x), m.c(x)]), "any dimension but the batch"),
        (lambda m, x: m.c(F.pad(x, (1, 1), value=1.0)), "only zero padding"),
        (lambda m, x: m.c(F.pad(x, (1, 1, 1, 1), mode="reflect")), "only zero padding"),
        (lambda m, x: m.c(F.pad(x, (-1, 0))), "only zero padding"),
        (lambda m, x: F.max_pool2d(F.pad(m.c(x), (1, 1)), 2), "not followed by a convolution"),
        (lambda m, x: F.max_pool2d(m.c(x), 17, 1, 8), "windows of up to 256"),
        (lambda m, x: m.c(x).clamp(-math.inf, math.inf), "needs lo < hi"),
        (lambda m, x: F.group_norm(m.c(x), 2, eps=0.0), "eps is 0.0"),
        (lambda m, x: F.conv2d(x, m.c.weight * 2, m.c.bias), "a parameter as an operand"),
        (lambda m, x: m.c(x) * 2.0, "a constant operand"),
        (lambda m, x: m.c(x) * m.c(x).mean(1, keepdim=True), "only the mean over height"),
        (lambda m, x: m.c(x) * m.c(x)[:, :1], "slice"),
        (lambda m, x: F.interpolate(m.c(x), 9, mode="bicubic"), "upsample_bicubic2d"),
        (lambda m, x: F.dropout(m.c(x), training=True), "dropout"),
        (lambda m, x: m.c(x.detach()), "detach"),
    ],
)
def test_a_use_that_is_not_supported_says_why(forward, why):
    with pytest.raises(UnsupportedOperator, match="not supported") as caught:
        mo.capture(Fn(forward, c=conv()), torch.zeros(IMAGE))
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: nn.InstanceNorm2d(4),
        lambda: Fn(lambda m, x: F.batch_norm(x, m.s.mean, m.s.var, training=True), s=stats()),
    ],
    ids=["no running statistics", "instance norm", "training flag"],
)
def test_a_norm_with_statistics_of_the_batch_is_refused_by_name(norm):
    with pytest.raises(UnsupportedOperator) as caught:
        mo.capture(Fn(lambda m, x: m.n(m.c(x)), c=conv(), n=norm()), torch.zeros(IMAGE))
    assert any(x.startswith("n: ") and "norm" in x for x in caught.value.details["where"])


def stats() -> nn.Module:
    module = nn.Module()
    module.register_buffer("mean", torch.zeros(4))
    module.register_buffer("var", torch.ones(4))
    return module


def test_a_norm_of_rank_three_is_refused():
    with pytest.raises(UnsupportedOperator, match="not supported") as caught:
        mo.capture(seq(nn.Linear(3, 4), nn.BatchNorm1d(5)), torch.zeros(1, 5, 3))
    assert "rank 3" in str(caught.value)


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (TwoInputs(), torch.zeros(IMAGE)),
        (Fn(lambda m, x: m.c(x) if x.sum() > 0 else x, c=conv()), torch.zeros(IMAGE)),
        (Fn(lambda m, x: m.c(x) * x.sum().item(), c=conv()), torch.zeros(IMAGE)),
        (conv(), torch.zeros(1, 5, 6, 6)),
        (nn.Linear(6, 2), torch.zeros(6)),
    ],
    ids=["two inputs", "branches on data", "python number", "wrong channels", "no batch"],
)
def test_a_model_that_cannot_be_traced_with_the_example_is_a_usage_error(model, example, capfd):
    with pytest.raises((UsageError, UnsupportedOperator)) as caught:
        mo.capture(model, example)
    assert caught.value.exit_code in (2, 4)
    assert capfd.readouterr() == ("", "")  # torch's own traceback is not shown


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: (m.c(x), x), lambda m, x: [m.c(x)], lambda m, x: {"logits": m.c(x)}],
    ids=["two", "list", "dict"],
)
def test_an_output_that_is_not_one_tensor_is_refused(forward):
    with pytest.raises(UsageError, match="output is not one tensor"):
        mo.capture(Fn(forward, c=conv()), torch.zeros(IMAGE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_an_input_that_is_not_float32_is_refused(dtype):
    model = nn.Embedding(5, 3) if dtype == torch.int64 else nn.Linear(4, 2).to(dtype)
    with pytest.raises(UsageError, match="modicum needs float32"):
        mo.capture(model, torch.zeros(1, 4, dtype=dtype))


@pytest.mark.parametrize("example", [torch.zeros(0, 3, 6, 6), torch.tensor(1.0), [[0.0]], None])
def test_an_example_that_is_no_tensor_with_samples_is_refused(example):
    with pytest.raises(UsageError, match="example"):
        mo.capture(conv(), example)


# ---- the model stays as it was ---------------------------------------------------------------


def marked() -> nn.Module:
    model = seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Tanh()).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("supported", [True, False])
def test_the_model_keeps_its_modes_weights_and_statistics(supported):
    model = marked()[: 3 if supported else 4]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    if supported:
        mo.capture(model, torch.randn(2, 3, 6, 6))
    else:
        with pytest.raises(UnsupportedOperator):
            mo.capture(model, torch.randn(2, 3, 6, 6))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_training_mode_gives_the_graph_of_its_eval_mode():
    model, graph = captured("norms")
    model.train()
    try:
        assert mo.capture(model, torch.zeros(1, 3, 8, 9)).hash == graph.hash
        assert model.training
    finally:
        model.eval()


# ---- shared parameters -----------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


def test_a_shared_parameter_is_one_parameter_that_cannot_be_trained_yet():
    graph = mo.capture(Tied(), torch.zeros(1, 5))
    assert [len(graph.users_of(p)) for p in graph.trainable() if p.endswith("weight")] == [2, 1]
    with pytest.raises(UsageError, match="shared by 2 nodes"):
        mo.plan(graph, method=mo.Full())


def test_around_a_shared_parameter_the_others_can_be_trained():
    model = Tied()
    graph = mo.capture(model, torch.zeros(1, 5))
    plan = mo.plan(graph, method=mo.Explicit(params={"head.*": None, "?.bias": None}))
    tuned = mo.apply(model, plan)
    x = torch.randn(2, 5)
    assert torch.allclose(tuned(x), model(x), atol=1e-6)


# ---- the model of a plan ---------------------------------------------------------------------


def test_another_model_is_refused_with_what_differs():
    _, graph = captured("mlp")
    check_model(graph, NETS["mlp"].make())
    fewer = seq(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(InvalidInput, match="does not belong to this graph") as caught:
        check_model(graph, fewer)
    assert "2.weight is (4, 9), the graph has (7, 9)" in str(caught.value)
    assert "5.weight is missing" in str(caught.value)


def test_a_model_of_the_same_parameters_but_another_structure_is_refused():
    _, graph = captured("mlp")
    other = seq(nn.Linear(6, 9), nn.Hardtanh(), nn.Linear(9, 7), nn.ReLU6(), nn.Identity(),
                nn.Linear(7, 4))  # fmt: skip
    with pytest.raises(InvalidInput, match="made for another model"):
        check_model(graph, other)
