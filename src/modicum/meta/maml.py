"""MAML: an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from modicum.meta.inner import Loss, Params, gradient_step, gradient_steps, own_params
from modicum.meta.learner import GradientLearner, Rule
from modicum.meta.norms import MetaNorm, Norms

Steps = Annotated[int, Field(ge=0)]
InnerRate = Annotated[float, Field(gt=0, lt=float("inf"))]


class MAML(Rule):
    """Inner rule, k = 1 .. `steps`: w_k = w_{k-1} - `rate` dL(w_{k-1}; support)/dw, from w_0 = w.
    Outer rule: a gradient step on sum_tasks L(w_K; query) by w.

    `order` "second" goes through the inner gradients, "first" takes them as constants (FOMAML).
    `judged`: inner steps when a task is judged; as many as in training by default.  `norms`: what
    batch norms do, see `Norms`.

    Finn et al., ICML 2017 (arXiv 1703.03400).
    """

    OUTER: ClassVar[dict[str, Any]] = {
        "optimizer": "adam", "rate": 1e-3, "warmup": 0, "warmup_rate": 0.0, "final_rate": 1e-5,
        "tasks": 4,
    }  # fmt: skip

    kind: Literal["maml"] = "maml"
    steps: Annotated[int, Field(ge=1)] = 5
    rate: InnerRate = 0.1
    order: Literal["first", "second"] = "second"
    judged: Steps | None = None
    norms: Norms = "batch"

    def learner(self, net: nn.Module) -> GradientLearner:
        return MAMLLearner(self, net)

    def moving(self, net: nn.Module) -> set[str]:
        """The parameters that the inner rule moves."""
        still = {
            f"{name}.{leaf}"
            for name, m in net.named_modules()
            if isinstance(m, MetaNorm) and m.setting == "per-step"
            for leaf in ("weight", "bias")
        }
        return {name for name, p in net.named_parameters() if p.requires_grad} - still


class MAMLLearner(GradientLearner):
    def __init__(self, rule: MAML, net: nn.Module, multi_step: float = 0.0) -> None:
        judged = rule.steps if rule.judged is None else rule.judged
        super().__init__(net, rule.norms, rule.steps, judged, multi_step)
        self.rule, self._moved = rule, rule.moving(self.net)

    @property
    def moved(self) -> set[str]:
        return self._moved

    def adapt(self, xs: Tensor, ys: Tensor, steps: int) -> list[Params]:
        params, second = own_params(self.net), self.second_order
        return list(
            gradient_steps(self.net, params, self.moved, (xs, ys), steps, self.step_size, second)
        )

    def step(self, params: Params, x: Tensor, loss: Loss, k: int) -> Params:
        second = self.second_order
        return gradient_step(self.net, params, self.moved, x, loss, k, self.step_size, second)

    @property
    def second_order(self) -> bool:
        return self.rule.order == "second" and self.training

    def step_size(self, name: str, step: int) -> Any:
        return self.rule.rate
