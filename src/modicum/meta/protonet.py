"""ProtoNet: embeddings such that the class of a query is the class of the nearest prototype."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.attended import detach
from modicum.errors import UsageError
from modicum.heads import BIAS, SCALE, CosineHead, FewShot, class_means, cosine
from modicum.meta.learner import Learner, Rule


class ProtoNet(Rule):
    """Inner rule: c_k = mean of the support embeddings of class k, no step is taken.  Outer rule:
    a gradient step on the cross-entropy of softmax_k(s (cos(f(x), c_k) + b)) over the queries,
    through the prototypes; the scale s and the bias b are learned.

    Snell et al., NeurIPS 2017 (arXiv 1703.05175), with the cosine of P>M>F (Hu et al., CVPR 2022,
    arXiv 2204.07305), whose values s and b start from.  TinyTrain (ICML 2024, eq. 1) has no s and
    b in its text; a bare softmax over cosines in [-1, 1] barely trains.

    `norms`: "frozen" leaves batch norms with the statistics that they came with, as on a device
    that sees one sample at a time; "batch" uses and follows those of each task.
    """

    kind: Literal["protonet"] = "protonet"
    scale: Annotated[float, Field(gt=0, lt=float("inf"))] = SCALE
    bias: Annotated[float, Field(gt=float("-inf"), lt=float("inf"))] = BIAS
    norms: Literal["frozen", "batch"] = "frozen"

    def learner(self, net: nn.Module) -> ProtoNetLearner:
        return ProtoNetLearner(self, net)


class ProtoNetLearner(Learner):
    """A few-shot model and what its head learns in meta-training."""

    def __init__(self, rule: ProtoNet, net: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, FewShot) or not isinstance(net.head, CosineHead):
            raise UsageError(
                "prototypes need a model with a cosine head", hint="few_shot(model, ways)"
            )
        self.rule, self.backbone = rule, net.backbone
        self.scale = nn.Parameter(torch.tensor([rule.scale]))
        self.bias = nn.Parameter(torch.tensor([rule.bias]))

    def train(self, mode: bool = True) -> ProtoNetLearner:
        """Norms use and follow the statistics of a task only where the rule says so."""
        super().train(mode)
        self.backbone.train(mode and self.rule.norms == "batch")
        return self

    def forward(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        """Task after task: what norms see is one of them."""
        made = [self.task(*task) for task in zip(xs, ys, xq, yq, strict=True)]
        return torch.stack([m[0] for m in made]).mean(), torch.stack([m[1] for m in made])

    def task(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(torch.cat([xs, xq]))
        prototypes = class_means(features[: len(xs)], ys, int(ys.max()) + 1)
        logits = cosine(features[len(xs) :], prototypes, self.scale, self.bias)
        return F.cross_entropy(logits, yq), logits

    def write_to(self, net: nn.Module) -> None:
        """Give the head what was learned for it; the backbone is the net's own."""
        assert isinstance(net, FewShot)
        detach(net)  # attention of an earlier training, which the backbone has moved away from
        with torch.no_grad():
            net.head.get_buffer("scale").copy_(self.scale)
            net.head.get_buffer("bias").copy_(self.bias)
