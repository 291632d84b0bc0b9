"""p-Meta: learn which layers and channels a task needs, and update only those."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from modicum.attended import Branch, ChannelAttention, attach
from modicum.errors import UsageError
from modicum.heads import last_linear
from modicum.lower import Loss as LossName
from modicum.meta.inner import Loss, Params, differentiate, loss_of, output, own_params
from modicum.meta.learner import GradientLearner
from modicum.meta.maml import MAML
from modicum.meta.memory import StepMemory
from modicum.meta.norms import transformed
from modicum.ops.attention import clip, magnitudes, most_kept
from modicum.selection import Slice
from modicum.units import Size, parse_size

Share = Annotated[float, Field(gt=0, le=1)]


class PMeta(MAML):
    """Inner rule, for layer l and step k: w_l <- w_l - alpha_l^k gamma_l (.) g(w_l).
    Outer rule: a gradient step on sum_tasks L(w_K; query) by w, alpha and the attention.

    - alpha_l^k >= 0, `rate` at first, is learned.  An entry that falls to 0 stays there, but for
      the last one of a step that keeps the limit.  From `prune_from` to `prune_to` of the training
      a limit on the peak dynamic memory of a step's backward pass, what it keeps included, falls
      from that of all layers to `ram` bytes (or to the `share` of it); in every step that is over
      the limit the entry with the smallest alpha / (bytes that the peak falls by without it) goes.
      What a forward pass holds for a moment no choice of layers lowers: it has no limit.
    - gamma_l = gamma^bw x gamma^fw: one score for each output channel, from the gradient of the
      layer's output, and one for each input channel, from its input; a softmax over channels, of
      which the largest are kept until their sum exceeds `rho` (`clip`).  `channels` names the
      sides: "both", "fw", "bw" or "none".  In meta-training the dense gradient is computed and
      masked, so that both branches learn; on a device only what is kept is stored and computed.
    - over the first `multi_step` share of the training the outer loss is taken after every inner
      step, as in MAML++.

    Choices of ours, where no published text says more: scores come from mean magnitudes over the
    batch and the pixels; gates have the mean 1 over what is kept; a bias has its layer's alpha and
    gamma^bw; norms are not adapted; the head has no attention, its outputs are the classes; of a
    grouped convolution only gamma^bw is used; the score that prunes, and its schedule.

    Qu et al., KDD 2022.
    """

    kind: Literal["p-meta"] = "p-meta"  # type: ignore[assignment]
    rho: Share = 0.5
    channels: Literal["both", "fw", "bw", "none"] = "both"
    ram: Size | None = None
    share: Share = 0.3
    multi_step: Annotated[float, Field(ge=0, le=1)] = 0.0
    prune_from: Annotated[float, Field(ge=0, le=1)] = 0.2
    prune_to: Annotated[float, Field(ge=0, le=1)] = 0.6
    pruning: Literal["score", "random", "last"] = "score"

    @model_validator(mode="after")
    def _in_order(self) -> PMeta:
        if self.prune_from > self.prune_to:
            raise ValueError(f"pruning from {self.prune_from} on cannot end at {self.prune_to}")
        return self

    @property
    def limit(self) -> int | None:
        """The peak dynamic memory of a backward pass in bytes, if it is given that way."""
        return None if self.ram is None else parse_size(self.ram)

    def learner(self, net: nn.Module) -> PMetaLearner:
        return PMetaLearner(self, net)


class PMetaLearner(GradientLearner):
    """Step sizes, attention, and a mask of the step sizes that have not been pruned."""

    allowed: Tensor

    def __init__(self, rule: PMeta, net: nn.Module) -> None:
        judged = rule.steps if rule.judged is None else rule.judged
        super().__init__(net, rule.norms, rule.steps, judged, rule.multi_step)
        self.rule = rule
        kinds = (nn.Conv2d, nn.Linear)
        self.layers = [n for n, m in self.net.named_modules() if isinstance(m, kinds)]
        if not self.layers:
            raise UsageError("p-Meta needs convolutions or linear layers to choose from")
        like = next(self.net.parameters())
        shape = (len(self.layers), rule.steps)
        self.alpha = nn.Parameter(like.new_full(shape, rule.rate))
        self.register_buffer("allowed", torch.ones(shape, dtype=torch.bool, device=like.device))
        self.attention = nn.ModuleDict()
        if rule.channels != "none":
            linear = any(isinstance(self.net.get_submodule(n), nn.Linear) for n in self.layers)
            head = last_linear(self.net)[0] if linear else ""
            for name in self.layers:
                if name != head:
                    made = _attention(self.net.get_submodule(name), rule.channels)
                    self.attention[name.replace(".", "/")] = made.to(like)
        self.memory: StepMemory | None = None

    @property
    def rates(self) -> Tensor:
        """alpha (layers, steps), 0 where an entry was pruned."""
        return self.alpha.clamp(min=0) * self.allowed

    @property
    def moved(self) -> set[str]:
        """Weight and bias of every layer that some step updates."""
        active = set().union(*(self.active(k) for k in range(self.steps)))
        names = {name for name, _ in self.net.named_parameters()}
        return {f"{a}.{leaf}" for a in active for leaf in ("weight", "bias")} & names

    def step_size(self, name: str, step: int) -> Tensor:
        layer = self.layers.index(name.rpartition(".")[0])
        return self.rates[layer, min(step, self.steps - 1)]

    def adapt(self, xs: Tensor, ys: Tensor, steps: int) -> list[Params]:
        params, made = own_params(self.net), []
        for k in range(steps):
            params = self.step(params, xs, lambda out, _: loss_of(out, ys), k)
            made.append(params)
        return made

    def step(self, params: Params, x: Tensor, loss: Loss, k: int) -> Params:
        """One masked step."""
        at, shapes = min(k, self.steps - 1), self._output_shapes(x)
        rates, kept = self.rates[:, at], self.allowed[:, at].tolist()
        active = [name for name, flag in zip(self.layers, kept, strict=True) if flag]
        own = {f"{a}.{leaf}" for a in active for leaf in ("weight", "bias")} & params.keys()
        still = {name: w for name, w in params.items() if name not in own}
        now = {name: params[name] for name in params if name in own}
        watched = [a for a in active if self._of(a) is not None]
        zeros = {a: x.new_zeros(shapes[a]) for a in watched}

        def value(at: Params) -> tuple[Tensor, Params]:
            part = {name: at[name] for name in now}
            with _watching(self.net, {a: at[_added(a)] for a in watched}) as seen:
                out = output(self.net, {**still, **part}, x, k)
            return loss(out, {**still, **part}), seen

        second = self.rule.order == "second" and self.training
        inside = any(map(transformed, (x, *params.values())))
        here = {**now, **{_added(a): zero for a, zero in zeros.items()}}
        gradients, pooled = differentiate(value, here, second, inside)
        dys = {a: gradients[_added(a)] for a in watched}
        moved = dict(params)
        for i, name in enumerate(self.layers):
            if name not in active:
                continue
            gates = self.gates(name, pooled.get(name), dys.get(name))
            for leaf in ("weight", "bias"):
                full = f"{name}.{leaf}"
                if full in now:
                    masked = _masked(gradients[full], gates, leaf)
                    moved[full] = now[full] - rates[i] * masked
        return moved

    def gates(
        self, layer: str, pooled: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(gamma^fw, gamma^bw) of a layer from its input's magnitudes (C,) and its output's
        gradient; None for a side without attention."""
        attention = self._of(layer)
        if attention is None or pooled is None or dy is None:
            return None, None
        fw = attention.fw and clip(attention.fw(pooled), self.rule.rho)
        bw = attention.bw and clip(attention.bw(magnitudes(dy)), self.rule.rho)
        return fw, bw

    def write_to(self, net: nn.Module) -> None:
        """The attention becomes part of `net`: of its layers, and of its state dict."""
        super().write_to(net)
        attach(net, self.attended, self.rule.rho)

    @property
    def attended(self) -> dict[str, ChannelAttention]:
        """The layers that have attention to a side."""
        found = {name: a for name in self.layers if (a := self._of(name)) is not None}
        return {name: a for name, a in found.items() if a.fw is not None or a.bw is not None}

    def slices(self) -> dict[str, Slice]:
        """Stand-ins for what is computed of each layer's weight at most."""
        rho = self.rule.rho
        return {
            name: Slice(out=_first(attention.bw, rho), inp=_first(attention.fw, rho))
            for name, attention in self.attended.items()
        }

    def _of(self, layer: str) -> ChannelAttention | None:
        found = dict(self.attention.items()).get(layer.replace(".", "/"))
        assert found is None or isinstance(found, ChannelAttention)
        return found

    def _output_shapes(self, x: Tensor) -> dict[str, torch.Size]:
        """Of every layer; a pass without gradients, on samples of zeros, once for each shape.

        What dropout draws there nothing after it may notice: a training that goes on makes this
        pass at another time.
        """
        key = tuple(x.shape)
        if getattr(self, "_shapes", (None, {}))[0] != key:
            shapes: dict[str, torch.Size] = {}

            def record(name: str, x: Tensor, out: Tensor) -> None:
                shapes[name] = out.shape

            devices = [x.device] if x.device.type == "cuda" else []
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=devices),
                _hooked(self.net, self.layers, record),
            ):
                self.net(torch.zeros(key, dtype=x.dtype, device=x.device))
            self._shapes = (key, shapes)
        return self._shapes[1]

    # ---- pruning ----

    def after_update(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> None:
        super().after_update(xs, ys, xq, yq)
        loss: LossName = "mse" if ys.is_floating_point() else "cross_entropy"
        self.keep_limits(tuple(xs.shape[1:]), len(xs), loss)

    def keep_limits(self, sample: tuple[int, ...], samples: int, loss: LossName) -> None:
        """Let alpha not be negative, and prune it by the limit on so many samples of a shape.

        Raises UsageError for a limit that no layer keeps.
        """
        if self.memory is None:
            self.memory = StepMemory(
                *(self.plain[0], sample, samples, self.slices()),
                batch_norms=self.norms != "frozen", loss=loss,
            )  # fmt: skip
            self._check_limit()
        with torch.no_grad():
            self.alpha.clamp_(min=0)
            for k in range(self.steps):
                self._keep_one(k)
            self.allowed &= self.alpha > 0
        limit = self.limit_now()
        if limit is not None:
            for k in range(self.steps):
                self.prune(k, limit)

    def _check_limit(self) -> None:
        """Raise UsageError, at the start and not where pruning ends, for too low a limit."""
        memory, limit = self.memory, self.limit()
        assert memory is not None
        least = min(self.layers, key=lambda name: memory.peak(frozenset({name})))
        if (peak := memory.peak(frozenset({least}))) > limit:
            raise UsageError(
                f"no layer can be updated in {limit} bytes of dynamic memory",
                why=f"a step needs {peak} with {least} alone",
                hint="a larger ram or share",
            )

    def _keep_one(self, k: int) -> None:
        """Step k updates something: where every entry that keeps the limit has fallen to 0, the
        last of them stays, with a thousandth of `rate`, from which it may rise again."""
        rows = [self.layers.index(name) for name in self._fitting(self.active(k))]
        if rows and not bool((self.alpha[rows, k] > 0).any()):
            self.alpha[rows[-1], k] = self.rule.rate / 1000

    def _fitting(self, active: frozenset[str]) -> list[str]:
        """Those of these layers that keep the limit of the end alone, in the order of the net."""
        memory, limit = self.memory, self.limit()
        assert memory is not None
        alone = [name for name in self.layers if name in active]
        return [name for name in alone if memory.peak(frozenset({name})) <= limit]

    def limit_now(self) -> int | None:
        """The limit on the peak dynamic memory of a step at this point of the training."""
        assert self.memory is not None
        rule, whole = self.rule, self.memory.peak(frozenset(self.layers))
        least = self.limit()
        if self.progress < rule.prune_from:
            return None
        span = max(rule.prune_to - rule.prune_from, 1e-9)
        done = min(1.0, (self.progress - rule.prune_from) / span)
        return max(least, int(whole * (least / whole) ** done))

    def limit(self) -> int:
        """The limit that every step keeps in the end."""
        assert self.memory is not None
        if self.rule.limit is not None:
            return self.rule.limit
        return int(self.rule.share * self.memory.peak(frozenset(self.layers)))

    @property
    def ready(self) -> bool:
        """Whether it has been pruned to the end."""
        memory = self.memory
        if memory is None:
            return False
        return all(memory.peak(self.active(k)) <= self.limit() for k in range(self.steps))

    def prune(self, k: int, limit: int) -> None:
        """Take entries of step k away until its peak dynamic memory keeps the limit."""
        assert self.memory is not None
        while self.memory.peak(self.active(k)) > limit:
            active = self.active(k)
            self.allowed[self.layers.index(self._weakest(active, k)), k] = False

    def _weakest(self, active: frozenset[str], k: int) -> str:
        """Which of these layers step k can do without; not the only one that keeps the limit of
        the end alone."""
        memory, fit = self.memory, self._fitting(active)
        assert memory is not None
        order = [name for name in self.layers if name in active and fit != [name]]
        if self.rule.pruning == "random":
            return random.Random(f"{k} {len(order)}").choice(order)
        if self.rule.pruning == "last":
            return order[0]  # what stays are the last layers
        rates = dict(zip(self.layers, self.alpha[:, k].tolist(), strict=True))
        peak = memory.peak(active)
        freed = {name: peak - memory.peak(active - {name}) for name in order}
        able = [name for name in order if freed[name] > 0]
        if not able:  # only several together lower the peak
            return min(order, key=lambda name: rates[name])
        return min(able, key=lambda name: rates[name] / freed[name])

    def active(self, k: int) -> frozenset[str]:
        """The layers that step k updates."""
        flags = self.allowed[:, k].tolist()
        return frozenset(n for n, flag in zip(self.layers, flags, strict=True) if flag)


def _added(layer: str) -> str:
    """The name of what is added to the output of a layer: that of no parameter."""
    return f"{layer} output"


def _first(branch: Branch | None, rho: float) -> tuple[int, ...] | None:
    """As many channels as `clip` leaves at most, the first ones in the place of any."""
    return None if branch is None else tuple(range(most_kept(branch.up.out_features, rho)))


def _attention(layer: nn.Module, channels: str) -> ChannelAttention:
    if isinstance(layer, nn.Conv2d):
        inputs, outputs, groups = layer.in_channels, layer.out_channels, layer.groups
    else:
        assert isinstance(layer, nn.Linear)
        inputs, outputs, groups = layer.in_features, layer.out_features, 1
    fw = channels in ("both", "fw") and groups == 1 and inputs > 1
    return ChannelAttention(inputs if fw else None, outputs if channels != "fw" else None)


def _masked(g: Tensor, gates: tuple[Tensor | None, Tensor | None], leaf: str) -> Tensor:
    """The dense gradient of a weight (out, in, ...) or bias (out,) times its gates."""
    fw, bw = gates
    if bw is not None:
        g = g * bw.reshape(-1, *[1] * (g.dim() - 1))
    if fw is not None and leaf == "weight":
        g = g * fw.reshape(1, -1, *[1] * (g.dim() - 2))
    return g


@contextmanager
def _watching(net: nn.Module, added: Params) -> Iterator[dict[str, Tensor]]:
    """Collect the magnitudes of the layers' inputs, and add `added` to their outputs: the
    gradient of what is added, zeros, is that of the output."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor, out: Tensor) -> Tensor:
        if x.dim() not in (2, 4):
            raise UsageError(
                f"{name!r} has an input of {x.dim()} dimensions, and attention chooses channels of "
                "(n, c) or (n, c, h, w)",
                hint="channels=none of p-meta",
            )
        seen[name] = magnitudes(x)
        return out + added[name]

    with _hooked(net, added, watch):
        yield seen


@contextmanager
def _hooked(
    net: nn.Module, layers: Iterable[str], hook: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call hook(name, input, output) where layers pass; what it returns replaces the output."""
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, named, out, name=name: hook(
                name, inputs[0] if inputs else named["input"], out
            ),
            with_kwargs=True,
        )
        for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
