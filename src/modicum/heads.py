"""Output layers for few-shot tasks: cosine to prototypes, or a linear layer made from them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.attended import Attention
from modicum.errors import UsageError
from modicum.graph import Graph

SCALE, BIAS = 10.0, 0.0  # where P>M>F starts (Hu et al., CVPR 2022)


@torch.library.custom_op("modicum::cosine_logits", mutates_args=())
def cosine_logits(x: Tensor, prototypes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale (cos(x, prototypes) + bias): (n, d), (ways, d), (1,), (1,) -> (n, ways).

    One operator, so that a captured model says what it is.
    """
    return cosine(x, prototypes, scale, bias)


@cosine_logits.register_fake
def _(x: Tensor, prototypes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], prototypes.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        return torch.autograd.grad(cosine(*inputs), inputs, dy)


cosine_logits.register_autograd(_gradients, setup_context=_keep)


def cosine(x: Tensor, prototypes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale (cos(x, prototypes) + bias), with gradients for all four: -> (n, ways)."""
    unit_x, unit_c = F.normalize(x, dim=-1, eps=1e-8), F.normalize(prototypes, dim=-1, eps=1e-8)
    return scale * (unit_x @ unit_c.T + bias)


def class_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Prototypes c_k = mean of the features of class k: (n, d), (n,) -> (ways, d).

    Raises UsageError for a class without a sample, and a label of no class.  Snell et al.,
    NeurIPS 2017.
    """
    strange = labels[(labels < 0) | (labels >= ways)]
    if len(strange):
        raise UsageError(
            f"labels must be whole numbers from 0 to {ways - 1}", why=f"one is {int(strange[0])}"
        )
    counts = torch.bincount(labels, minlength=ways)
    if not bool(counts.all()):
        raise UsageError(
            f"the support set does not have samples of each of {ways} classes",
            why=f"samples per class: {counts.tolist()}",
        )
    sums = features.new_zeros(ways, features.shape[1]).index_add(0, labels, features)
    return sums / counts[:, None]


class CosineHead(nn.Module):
    """scale (cos(x, c_k) + bias): (n, features) -> (n, ways).

    The prototypes c_k are set by `refresh`, not trained; scale and bias are learned in
    meta-training and frozen on a device.  All are buffers, so that plans keep them as they are.
    """

    prototypes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, features: int, ways: int, scale: float = SCALE, bias: float = BIAS) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(ways, features))
        self.register_buffer("scale", torch.tensor([scale]))
        self.register_buffer("bias", torch.tensor([bias]))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cosine_logits(x, self.prototypes, self.scale, self.bias)
        return cosine(x, self.prototypes, self.scale, self.bias)

    def refresh(self, features: Tensor, labels: Tensor) -> None:
        """Prototypes of a support set: (n, features), (n,).  Raises UsageError, see class_means."""
        means = class_means(features.detach(), labels, len(self.prototypes))
        self.prototypes.copy_(means)


class FewShot(nn.Module):
    """A backbone that embeds, and a head: (n, ...) -> (n, ways)."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def of_ways(self, ways: int) -> FewShot:
        """The same backbone, shared, under a cosine head for so many classes, without prototypes.

        Raises UsageError for another head.
        """
        old = self.head
        if not isinstance(old, CosineHead):
            raise UsageError("tasks need a cosine head", hint="few_shot(model, ways)")
        head = CosineHead(old.prototypes.shape[1], ways, float(old.scale), float(old.bias))
        return FewShot(self.backbone, head.to(old.scale.device)).train(self.training)


def few_shot(model: nn.Module, ways: int, scale: float = SCALE, bias: float = BIAS) -> FewShot:
    """A copy of a classifier with a CosineHead in the place of its last linear layer.

    The last in the order in which the model lists its modules.  Raises UsageError for fewer than
    2 ways, and for a model without such a layer.
    """
    _check_ways(ways)
    backbone = copy.deepcopy(model)
    name, layer = last_linear(backbone)
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, nn.Identity())
    head = CosineHead(layer.in_features, ways, scale, bias).to(layer.weight.device)
    return FewShot(backbone, head)


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name and layer of the last linear layer in a model."""
    attention = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Attention))
    layers = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n and not n.startswith(attention)
    ]
    if not layers:
        raise UsageError(
            "the model has no linear layer that could be its head",
            hint="FewShot(backbone, CosineHead(features, ways)) around what embeds",
        )
    return layers[-1]


def _check_ways(ways: int) -> None:
    if ways < 2:
        raise UsageError(f"{ways} classes leave nothing to tell apart", hint="2 or more")


def linear_from_prototypes(prototypes: Tensor) -> nn.Linear:
    """The linear layer whose outputs differ from -|x - c_k|^2 by what is the same for all k.

    w_k = 2 c_k, b_k = -|c_k|^2: (ways, d) -> d to ways (Triantafillou et al., ICLR 2020).
    """
    ways, features = prototypes.shape
    layer = nn.Linear(features, ways, device=prototypes.device)
    with torch.no_grad():
        layer.weight.copy_(2 * prototypes)
        layer.bias.copy_(-prototypes.square().sum(1))
    return layer


def with_ways(graph: Graph, ways: int) -> Graph:
    """The captured graph of a few-shot model for another number of classes, 2 or more."""
    _check_ways(ways)
    last = graph.by_name.get(graph.output)
    if last is None or last.op != "cosine":
        raise UsageError("the model does not end with a cosine head", hint="few_shot(model, ways)")
    name = last.params["prototypes"]
    wide = graph.params[name]
    params = {**graph.params, name: wide.model_copy(update={"shape": (ways, wide.shape[1])})}
    out = graph.values[last.name]
    values = {**graph.values, last.name: out.model_copy(update={"shape": (1, ways)})}
    return graph.model_copy(update={"params": params, "values": values})
