"""ProtoNet: embeddings such that the class of a query is the class of the nearest prototype."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from modicum.graph import Frozen
from modicum.heads import BIAS, SCALE, FewShot, class_means, cosine


class ProtoNet(Frozen):
    """Inner rule: c_k = mean of the support embeddings of class k, no step is taken.  Outer rule:
    a gradient step on the cross-entropy of softmax_k(s (cos(f(x), c_k) + b)) over the queries,
    through the prototypes; the scale s and the bias b are learned.

    Snell et al., NeurIPS 2017 (arXiv 1703.05175), with the cosine of P>M>F (Hu et al., CVPR 2022,
    arXiv 2204.07305), whose values s and b start from.  TinyTrain (ICML 2024, eq. 1) has no s and
    b in its text; a bare softmax over cosines in [-1, 1] barely trains.
    """

    kind: Literal["protonet"] = "protonet"
    scale: Annotated[float, Field(gt=0, lt=float("inf"))] = SCALE
    bias: Annotated[float, Field(gt=float("-inf"), lt=float("inf"))] = BIAS


class ProtoNetLoss(nn.Module):
    """What one task costs; its parameters are those that the outer rule moves."""

    def __init__(self, rule: ProtoNet, net: FewShot) -> None:
        super().__init__()
        self.backbone = net.backbone
        self.scale = nn.Parameter(torch.tensor([rule.scale]))
        self.bias = nn.Parameter(torch.tensor([rule.bias]))
        self.to(next(net.parameters()).device)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits of the queries: (n, ...), (n,), (m, ...) -> (m, ways)."""
        features = self.backbone(torch.cat([support, query]))
        ways = int(labels.max()) + 1
        prototypes = class_means(features[: len(support)], labels, ways)
        return cosine(features[len(support) :], prototypes, self.scale, self.bias)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def write_to(self, net: FewShot) -> None:
        """Give the head what was learned for it; the backbone is the net's own."""
        head = net.head
        with torch.no_grad():
            head.get_buffer("scale").copy_(self.scale)
            head.get_buffer("bias").copy_(self.bias)
