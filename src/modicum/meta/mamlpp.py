"""MAML++: MAML with learned step sizes, a loss after every step, and norms for each step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from modicum.meta.inner import layers_of
from modicum.meta.maml import MAML, MAMLLearner
from modicum.meta.norms import Norms


class MAMLPP(MAML):
    """MAML with what makes its training steady (Antoniou et al., ICLR 2019, arXiv 1810.09502):

    - a learned step size for each layer and step, `rate` at first (LSLR);
    - the outer loss sum_k v_k L(w_k; query) after every inner step, v_k = 1/K at first; over the
      first `multi_step` share of the training all but v_K fall linearly to 0.03 / K (MSL);
    - first-order gradients for the first `first_order` share of the training (DA);
    - norms "per-step": statistics, scale and shift of each step (BNRS, BNWB);
    - a cosine schedule of the outer rate, which all rules here have (CA).

    Layers that share a step size are modules with parameters of their own.
    """

    kind: Literal["maml++"] = "maml++"  # type: ignore[assignment]
    norms: Norms = "per-step"
    multi_step: Annotated[float, Field(ge=0, le=1)] = 0.15
    first_order: Annotated[float, Field(ge=0, le=1)] = 0.0

    def learner(self, net: nn.Module) -> MAMLPPLearner:
        return MAMLPPLearner(self, net)


class MAMLPPLearner(MAMLLearner):
    rule: MAMLPP

    def __init__(self, rule: MAMLPP, net: nn.Module) -> None:
        super().__init__(rule, net, rule.multi_step)
        moved = [names for names in layers_of(self.net).values() if self.moved & set(names)]
        self.layer = {name: i for i, names in enumerate(moved) for name in names}
        like = next(self.net.parameters())
        self.rates = nn.Parameter(like.new_full((rule.steps, len(moved)), rule.rate))

    def step_size(self, name: str, step: int) -> Tensor:
        return self.rates[min(step, len(self.rates) - 1), self.layer[name]]

    def adapt(self, xs: Tensor, ys: Tensor, steps: int) -> list[dict[str, Tensor]]:
        if self.progress < self.rule.first_order:
            own, self.rule = self.rule, self.rule.model_copy(update={"order": "first"})
            try:
                return super().adapt(xs, ys, steps)
            finally:
                self.rule = own
        return super().adapt(xs, ys, steps)
