"""A net under a rule: what one task costs, and what the outer rule moves."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from modicum.attended import detach, without_attention
from modicum.errors import UsageError
from modicum.graph import Frozen
from modicum.meta.inner import Loss, Params, clear_errors, loss_of, output, own_params
from modicum.meta.norms import Norms, following, norms_of, plain_state, with_norms


class Rule(Frozen):
    """An inner rule, which learns a task, and an outer rule, which learns from how that went.

    `OUTER` are defaults of the training that the rule was published with (fields of MetaTrain).
    """

    OUTER: ClassVar[dict[str, Any]] = {}

    kind: str

    def learner(self, net: nn.Module) -> Learner:
        """The net under this rule; `net` is left alone until `write_to`."""
        raise NotImplementedError


class Learner(nn.Module):
    """The parameters of this module are what the outer rule moves, its loss is what it lowers.

    `progress`, from 0 to 1, is how much of the training is done.
    """

    progress = 0.0

    def task(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, outputs for the queries) of one task: (n, ...), (n,), (m, ...), (m,)."""
        raise NotImplementedError

    def forward(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, outputs (t, m, ...)) of t tasks, at once: (t, n, ...), .., (t, m)."""
        if len(xs) == 1:
            loss, out = self.task(xs[0], ys[0], xq[0], yq[0])
            return loss, out[None]
        losses, outs = vmap(self.task, randomness="different")(xs, ys, xq, yq)
        return losses.mean(), outs

    def after_update(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> None:
        """What follows each update of the outer rule; given is the last task."""

    @property
    def ready(self) -> bool:
        """Whether it keeps the limits that it is trained to keep."""
        return True

    def write_to(self, net: nn.Module) -> None:
        """Give `net` what was learned."""
        raise NotImplementedError


class GradientLearner(Learner):
    """A learner whose inner rule takes steps from the parameters of a net.

    `net` is a copy with norms of a setting; `steps` inner steps in meta-training and `judged` when
    a task is judged.  Over the first `multi_step` share of the training the outer loss is taken
    after every inner step (MAML++).
    """

    def __init__(
        self, net: nn.Module, norms: Norms, steps: int, judged: int, multi_step: float = 0.0
    ) -> None:
        super().__init__()
        net = without_attention(net)
        self.net = with_norms(net, norms, steps)
        self.plain = (copy.deepcopy(net),)  # its structure; no submodule
        self.steps, self.judged, self.norms = steps, judged, norms
        self.multi_step = multi_step
        convolutions = (m for m in self.net.modules() if isinstance(m, nn.Conv2d))
        self.grouped = any(m.groups > 1 for m in convolutions)

    @property
    def moved(self) -> set[str]:
        """The parameters that the inner rule moves."""
        raise NotImplementedError

    @property
    def has_norms(self) -> bool:
        return bool(norms_of(self.net))

    def step_size(self, name: str, step: int) -> Any:
        """Of a parameter in an inner step."""
        raise NotImplementedError

    def adapt(self, xs: Tensor, ys: Tensor, steps: int) -> list[Params]:
        """The parameters after each inner step on a support set."""
        raise NotImplementedError

    def step(self, params: Params, x: Tensor, loss: Loss, k: int) -> Params:
        """The parameters after inner step k from `params`, on inputs (n, ...) under any loss."""
        raise NotImplementedError

    def importance(self) -> list[float]:
        """v_k of the outer loss sum_k v_k L(w_k; query), for k = 1 .. K; they add up to 1."""
        steps = self.steps
        done = min(1.0, self.progress / self.multi_step) if self.multi_step else 1.0
        least = 0.03 / steps if done < 1 else 0.0
        early = max((1 - done) / steps, least)
        return [early] * (steps - 1) + [1 - early * (steps - 1)]

    def task(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            params = self.adapt(xs, ys, self.judged)[-1] if self.judged else own_params(self.net)
            out = output(self.net, params, xq, self.judged)
            return loss_of(out, yq), out
        losses = []
        after_each = self.adapt(xs, ys, self.steps)
        for k, (share, params) in enumerate(zip(self.importance(), after_each, strict=True), 1):
            if share:
                out = output(self.net, params, xq, k)
                losses.append(share * loss_of(out, yq))
        return torch.stack(losses).sum(), out

    def forward(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> tuple[Tensor, Tensor]:
        for norm in norms_of(self.net):
            norm.together = len(xs) > 1
        with clear_errors(self.net):
            if len(xs) == 1 and not self.grouped:
                xs, xq = channels_last(xs[0])[None], channels_last(xq[0])[None]
            return super().forward(xs, ys, xq, yq)

    @torch.no_grad()
    def after_update(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> None:
        """Let running statistics follow the queries."""
        with following(self.net):
            output(self.net, own_params(self.net), xq, 0)

    def write_to(self, net: nn.Module) -> None:
        detach(net)  # of an earlier training
        state = plain_state(self.net)
        known = net.state_dict()
        odd = {k for k in known if k not in state and not k.endswith("num_batches_tracked")}
        if odd:
            raise UsageError("the net is not the one that was trained", where=", ".join(odd))
        net.load_state_dict({**known, **{k: v for k, v in state.items() if k in known}})


def channels_last(x: Tensor) -> Tensor:
    """The same images, channels last in memory: on a CPU max-pooling is then 10 times as fast, and
    norms 4 times.

    Grouped convolutions must not see it: their weight gradients are wrong for some such inputs
    in PyTorch 2.13.
    """
    if x.dim() != 4 or x.device.type != "cpu":
        return x
    c, h, w = x.shape[1:]
    if c == 1:  # both layouts at once, of which PyTorch would take the other one
        return x.contiguous().as_strided(x.shape, (h * w, 1, w, 1))
    return x.contiguous(memory_format=torch.channels_last)
