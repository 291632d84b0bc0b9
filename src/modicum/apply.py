"""nn.Module + Plan -> nn.Module that keeps exactly what the plan says, under ordinary autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from modicum.capture import check_model, state_of
from modicum.errors import UsageError
from modicum.graph import Graph, Node
from modicum.heads import class_means
from modicum.lower import Program
from modicum.ops import OPS
from modicum.ops.attention import SIDES, chosen, gated, gates, magnitudes, spread
from modicum.ops.base import Kept, Op, Wanted
from modicum.ops.conv2d import inputs_of
from modicum.plan import Plan
from modicum.selection import Slice
from modicum.state import cut, materialise
from modicum.stream import Pass, Streaming, streaming

Gates = tuple[Tensor | None, Tensor | None]
"""Of the input and of the output channels of a layer, 0 where one is left out."""


def apply(model: nn.Module, plan: Plan) -> Tuned:
    """The model as the plan trains it: an ordinary nn.Module for your own loop.

    Its parameters are the trained slices, nothing else; its weights start as copies of the
    model's, which is left alone.  Works with any loss and optimiser, any batch size, on CPU or
    GPU.  Norms that follow batch statistics do so in training mode, with the batch that passes;
    call `eval()` to predict.  `write_to(model)` puts what was learned back.  Raises InvalidInput
    when the plan was made for another model.
    """
    check_model(plan.graph, model)
    return Tuned(model, plan)


class Tuned(nn.Module):
    """A model under a plan.  `trained` maps parameter names to the trained slices.

    Where the plan's step sizes differ by inner step, `inner_step` says what the next forward pass
    is of: 0 at first, to be raised by one after each update.  Parameters whose step size is 0 in
    it get no gradient, and nothing is kept for them.

    Layers with channel attention choose in each pass, by the samples that pass together, which of
    their channels are kept and get a gradient; that of the others is 0.  `gates` has the choice of
    the last pass, by layer.  Where the samples of an update do not pass together, they pass twice,
    first in ``with tuned.look():``, as on a board.

    With `chunk` frozen layers take so many samples at a time, whatever passes together: less
    memory for the same outputs, but for rounding.  Where frozen norms use the statistics of the
    batch, some layers are computed twice (see `modicum.stream`).
    """

    chunk: int | None = None

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.inner_step = 0
        graph = self._graph = plan.program.graph
        self.nodes = graph.nodes
        self._release = _last_uses(graph)
        self.gates: dict[str, Gates] = {}
        self._held: dict[str, Gates] = {}  # what `look` chose
        self._seen: dict[str, _Seen] | None = None  # while it looks
        self._streams: dict[tuple[int, int, int, bool], Streaming] = {}
        self._ways = tuple(_Way.of(program) for program in plan.programs)
        self._looks = tuple(None if p is None else _Way.of(p) for p in plan.looks)
        # what takes part in the backward pass of some inner step
        self._moving = frozenset(name for way in self._ways for name in way.wanting)
        self._boundary = _boundary(graph, self._moving)
        device = next(model.parameters()).device
        values = materialise(graph, state_of(model))
        self._slices = {t.param: t.slice for t in plan.program.trained}
        self._slots = nn.ParameterDict()
        # looked up at every node of every step, so neither by name nor by nn.Module's own search
        self._keys = {name: _slot(name) for name in values}
        for name, value in values.items():
            s = self._slices.get(name)
            if s is not None:
                part = torch.from_numpy(cut(value, s).copy()).to(device)
                self._slots[_slot(name)] = nn.Parameter(part)
            if s is None or not s.whole:
                self.register_buffer(_slot(name), torch.from_numpy(value.copy()).to(device))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: self._slots[_slot(name)] for name in self._slices}

    @property
    def moving(self) -> dict[str, Tensor]:
        """All that a step changes: the trained slices, and statistics that norms follow."""
        statistics = {t.param: getattr(self, _slot(t.param)) for t in self.plan.program.statistics}
        return {**self.trained, **statistics}

    def forward(self, x: Tensor) -> Tensor:
        way = self._way
        if self.chunk is None or len(x) <= self.chunk or self._seen is not None:
            values, nodes = self._entering(x, way.boundary), self.nodes
        else:
            values = self._streamed(x, self.chunk)
            nodes = tuple(n for n in self.nodes if n.name in way.wanting)
        y = self._value(values, nodes, self._graph.output)
        # a pass that only looks at inputs asks for no gradient, and a loop calls backward() anyway
        return y if self._seen is None or y.requires_grad else y.requires_grad_()

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: (n, ...) -> (n, features)."""
        return self._value(
            self._entering(x, self._way.boundary), self.nodes, self.nodes[-1].inputs[0]
        )

    def prefix(self, x: Tensor) -> dict[str, Tensor]:
        """What the frozen nodes hand to the others, for samples that pass more than once.

        Those that are frozen in every inner step.  Each value has the samples in its first
        dimension; values of several batches can be joined, and `features_after` goes on from there.
        """
        values, way = self._entering(x, self._boundary), self._way
        for node in self.nodes:
            if node.name not in self._moving:
                self._advance(way, node, values, frozen=True)
        return {name: values[name] for name in self._boundary}

    def features_after(self, prefix: Mapping[str, Tensor]) -> Tensor:
        """`features` of the samples that `prefix` was made of."""
        rest = [n for n in self.nodes if n.name in self._moving]
        return self._value(dict(prefix), rest, self.nodes[-1].inputs[0])

    def head(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Prototypes (ways, features), scale (1,) and bias (1,) of a cosine head, if there is."""
        if self.nodes[-1].op != "cosine":
            return None
        p = self._params(self.nodes[-1], {})
        return p["prototypes"], p["scale"], p["bias"]

    def refresh(self, x: Tensor, y: Tensor) -> None:
        """Set the prototypes of a cosine head to the class means of a support set.

        (n, ...), (n,).  Embedded as for a prediction: no gradient goes through them, and norms use
        their running statistics.  Raises UsageError for a class without a sample, and for a model
        with another head.
        """
        head = self.head()
        if head is None:
            raise UsageError("the model has no cosine head", hint="few_shot(model, ways)")
        prototypes = head[0]
        training = self.training
        self.eval()
        with torch.no_grad():
            features = self.features(x.to(prototypes.device))
        self.train(training)
        means = class_means(features, y.to(prototypes.device), len(prototypes))
        prototypes.copy_(means)

    def _entering(self, x: Tensor, boundary: frozenset[str]) -> dict[str, Tensor]:
        x = x.detach()
        if x.dim() == 4 and x.device.type == "cpu":
            # PyTorch's convolutions of one thread are up to seven times as fast that way, the
            # backward ones are not, and some of them are wrong: so only where nothing is kept
            x = x.contiguous(memory_format=torch.channels_last)
        source = self._graph.input
        return {source: x.contiguous() if source in boundary else x}

    @property
    def attends(self) -> bool:
        """Whether attention chooses channels in the inner step that is next."""
        return self._looks[self.plan.pattern_of(self.inner_step)] is not None

    @contextmanager
    def look(self) -> Iterator[None]:
        """For passes, forward and backward, that give no gradients but choose channels.

        The choice holds for all passes until `forget`, which `adapt.update` calls.
        """
        self.forget()
        if not self.attends:
            raise UsageError("no attention chooses channels in this inner step")
        self._seen = {}
        try:
            yield
            for node in self.nodes:
                if looks := self._way.program.wanted[node.name].looks:
                    seen = self._seen.get(node.name, _Seen())
                    self._held[node.name] = seen.gates(node, self._params(node, {}), looks)
        finally:
            self._seen = None

    def forget(self) -> None:
        """From here on each pass chooses for itself."""
        self._held = {}

    @property
    def _way(self) -> _Way:
        pattern = self.plan.pattern_of(self.inner_step)
        look = self._looks[pattern]
        return look if look is not None and self._seen is not None else self._ways[pattern]

    def _value(self, values: dict[str, Tensor], nodes: Sequence[Node], wanted: str) -> Tensor:
        way = self._way
        for node in nodes:
            if wanted in values:
                break
            self._advance(way, node, values)
        return values[wanted]

    def _advance(
        self, way: _Way, node: Node, values: dict[str, Tensor], frozen: bool = False
    ) -> None:
        """Run one node, and let go of what nothing after it reads."""
        boundary = self._boundary if frozen else way.boundary
        inputs = [values[name] for name in node.inputs]
        for name in self._release[node.name]:
            if not (frozen and name in boundary):
                del values[name]
        y = self._run(way, node, inputs)
        values[node.name] = y.contiguous() if node.name in boundary else y

    def _streamed(self, x: Tensor, chunk: int) -> dict[str, Tensor]:
        """What the frozen layers hand to the others, or the output if all are frozen."""
        if chunk < 1:
            raise UsageError(
                f"frozen layers cannot take {chunk} samples at a time", hint="1, or None"
            )
        way, source = self._way, self._graph.input
        key = (self.plan.pattern_of(self.inner_step), len(x), chunk, self.training)
        if key not in self._streams:
            self._streams[key] = streaming(way.program, len(x), chunk, self.training)
        rows = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
        waiting: list[dict[str, Tensor]] = [{} for _ in rows]
        affine: dict[str, tuple[Tensor, Tensor]] = {}
        done: dict[str, Tensor] = {}
        with torch.no_grad():
            for each in self._streams[key].passes:
                moments = _Moments()
                for i, part in enumerate(rows):
                    values = {**self._entering(x[part], frozenset()), **waiting[i]}
                    waiting[i] = waiting[i] if not each.kept else {}
                    held = self._pass(each, values, affine)
                    if each.norm is not None:
                        waiting[i] = held
                        moments.add(values[each.norm.inputs[0]])
                        continue
                    for name, value in held.items():
                        if name not in done:
                            done[name] = value.new_empty(len(x), *value.shape[1:])
                        done[name][part] = value
                if each.norm is not None:
                    affine[each.norm.name] = self._normalising(each.norm, moments)
        if source in way.boundary:
            done |= self._entering(x, way.boundary)
        return done

    def _pass(
        self,
        each: Pass,
        values: dict[str, Tensor],
        affine: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Run the nodes of a pass on some samples; what these wait with at the cut."""
        held = {name: values[name] for name in each.holds if name in values}
        for k, node in enumerate(each.nodes, 1):
            inputs = [values[name] for name in node.inputs]
            for name in self._release[node.name]:
                del values[name]
            over, params = node.name in each.overwriting, self._params(node, {})
            if node.op == "batch_norm" or node.name in affine:
                scale, shift = affine.get(node.name) or _affine(params)
                y = inputs[0] if over else inputs[0].clone()
                y.mul_(_over_channels(scale, y)).add_(_over_channels(shift, y))
            elif over:
                y = torch.clamp_(inputs[0], node.attrs["lo"], node.attrs["hi"])
            else:
                y = OPS[node.op].forward(node, inputs, params)
            values[node.name] = y
            del inputs, y
            if k == each.kept:
                held = {name: values[name] for name in each.holds}
        return held

    def _normalising(self, norm: Node, moments: _Moments) -> tuple[Tensor, Tensor]:
        """(scale, shift) by the statistics of the batch, which the running ones follow."""
        params, momentum = self._params(norm, {}), norm.attrs["momentum"]
        unbiased = moments.variance * moments.count / (moments.count - 1)
        for role, now in (("mean", moments.mean), ("var", unbiased)):
            params[role].lerp_(now, momentum)
        rstd = (moments.variance + norm.attrs["eps"]).rsqrt()
        return _affine({**params, "mean": moments.mean, "rstd": rstd})

    def _run(self, way: _Way, node: Node, inputs: list[Tensor]) -> Tensor:
        op = OPS[node.op]
        wanted = way.program.wanted[node.name]
        if "fw" in wanted.looks and self._seen is not None:
            self._seen.setdefault(node.name, _Seen()).add("fw", inputs[0])
        if not wanted.any:
            with torch.no_grad():
                params = self._params(node, {})
                if op.states and self.training:
                    return op.forward_saving(node, inputs, self._still(op, params))[0]
                if node.name in way.in_place:
                    return torch.clamp_(inputs[0], node.attrs["lo"], node.attrs["hi"])
                return op.forward(node, inputs, params)
        if op.plain_autograd:
            return op.forward(node, inputs, {})
        if op.states and not self.training:  # an affine map by the running statistics
            slots = {role: self._slots[_slot(node.params[role])] for role in wanted.params}
            return op.forward(node, inputs, self._params(node, slots))
        if wanted.looks:  # the weight is passed for its sake: the gradient has to come by
            weight = self._slots[_slot(node.params["weight"])]
            return cast(Tensor, _Look.apply(self, wanted, node, inputs[0], weight))
        trained = {role: self._slots[_slot(node.params[role])] for role in wanted.params}
        if gated(node, wanted):
            return cast(Tensor, _Gated.apply(self, wanted, node, inputs[0], *trained.values()))
        y = _Step.apply(self, way.program, node, len(inputs), *inputs, *trained.values())
        return cast(Tensor, y)

    def _still(self, op: Op, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """While it looks, norms do not follow the samples: they pass again."""
        if self._seen is None:
            return params
        return {role: p.clone() if role in op.states else p for role, p in params.items()}

    def _params(self, node: Node, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The node's whole parameters; a trained slice is laid over its frozen rest."""
        params = {}
        for role, name in node.params.items():
            s = self._slices.get(name)
            if s is None:
                params[role] = self._buffers[self._keys[name]]
                continue
            part = trained[role] if role in trained else self._slots[_slot(name)].detach()
            params[role] = part if s.whole else _overlay(getattr(self, _slot(name)), part, s)
        return params

    def write_to(self, model: nn.Module) -> None:
        """Copy the trained slices into `model`'s parameters of the same names."""
        targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, value in self.learned().items():
                targets[name].copy_(value)

    def learned(self) -> dict[str, Tensor]:
        """The parameters that changed, whole, by name."""
        whole = {}
        for name, slot in self.trained.items():
            s = self._slices[name]
            part = slot.detach()
            whole[name] = part.clone() if s.whole else _overlay(getattr(self, _slot(name)), part, s)
        for t in self.plan.program.statistics:
            whole[t.param] = getattr(self, _slot(t.param)).clone()
        return whole


@dataclass(frozen=True)
class _Way:
    """How one pattern passes the nodes.

    `wanting` take part in the backward pass; `boundary` is what the others, or the input, hand to
    them; `in_place` are clamps that may overwrite what they clamp.
    """

    program: Program
    wanting: frozenset[str]
    boundary: frozenset[str]
    in_place: frozenset[str]

    @staticmethod
    def of(program: Program) -> _Way:
        graph = program.graph
        wanting = frozenset(n.name for n in graph.nodes if program.wanted[n.name].any)
        return _Way(program, wanting, _boundary(graph, wanting), _frozen_clamps(graph, wanting))


class _Step(torch.autograd.Function):
    """One node: forward as the operator says, keeping what the plan says."""

    @staticmethod
    def forward(
        ctx: Any, tuned: Tuned, program: Program, node: Node, n_inputs: int, *tensors: Tensor
    ) -> Tensor:
        inputs, trained = tensors[:n_inputs], tensors[n_inputs:]
        roles = list(program.wanted[node.name].params)
        params = tuned._params(node, dict(zip(roles, trained, strict=True)))
        op = OPS[node.op]
        aux = None
        if any(k.kind in ("code", "stats") for k in program.kept[node.name]):
            y, aux = op.forward_saving(node, inputs, tuned._still(op, params))
        else:
            y = op.forward(node, inputs, params)
        kept = [_keep(k, node, inputs, y, aux) for k in program.kept[node.name]]
        ctx.save_for_backward(*kept, *trained)
        ctx.tuned, ctx.program, ctx.node, ctx.n_kept = tuned, program, node, len(kept)
        ctx.shapes, ctx.y_shape = [tuple(x.shape) for x in inputs], tuple(y.shape)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        node, tuned, program = ctx.node, ctx.tuned, ctx.program
        wanted: Wanted = program.wanted[node.name]
        saved = ctx.saved_tensors
        trained = dict(zip(wanted.params, saved[ctx.n_kept :], strict=True))
        kept = [
            _restore(k, node, t, ctx.y_shape)
            for k, t in zip(program.kept[node.name], saved[: ctx.n_kept], strict=True)
        ]
        params = tuned._params(node, trained)
        dx, grads = OPS[node.op].backward(node, dy, kept, params, wanted, ctx.shapes)
        return (None, None, None, None, *dx, *(grads[role] for role in wanted.params))


class _Gated(torch.autograd.Function):
    """A layer of which attention chooses the input channels that are kept, and of the gradients of
    weight and bias the entries that are computed.  The others are 0."""

    @staticmethod
    def forward(
        ctx: Any, tuned: Tuned, wanted: Wanted, node: Node, x: Tensor, *trained: Tensor
    ) -> Tensor:
        params = tuned._params(node, dict(zip(wanted.params, trained, strict=True)))
        held = tuned._held.get(node.name)
        ctx.fw = held[0] if held else gates(node, params, "fw", magnitudes(x))
        ctx.inp = chosen(ctx.fw)
        kept = x if ctx.inp is None else x[:, list(ctx.inp)]
        ctx.save_for_backward(kept, *trained)
        ctx.tuned, ctx.wanted, ctx.node, ctx.shape = tuned, wanted, node, tuple(x.shape)
        return OPS[node.op].forward(node, [x], params)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        node, tuned, wanted = ctx.node, ctx.tuned, ctx.wanted
        x, *trained = ctx.saved_tensors
        params = tuned._params(node, dict(zip(wanted.params, trained, strict=True)))
        held = tuned._held.get(node.name)
        bw = held[1] if held else gates(node, params, "bw", magnitudes(dy))
        part = Slice(out=chosen(bw), inp=ctx.inp)
        parts = {role: part if role == "weight" else Slice(out=part.out) for role in wanted.params}
        if node.attrs.get("groups", 1) > 1:  # of the groups that have a chosen channel
            x = x[:, list(inputs_of(node, params["weight"].shape, part))]
        compact = Wanted(wanted.dx, parts)
        dx, grads = OPS[node.op].backward(node, dy, [x], params, compact, [ctx.shape])
        tuned.gates[node.name] = (ctx.fw, bw)
        whole = (spread(grads[r], params[r], parts[r], ctx.fw, bw) for r in wanted.params)
        return (None, None, None, *dx, *whole)


class _Look(torch.autograd.Function):
    """A layer whose attention sees the gradient of its output; it learns nothing."""

    @staticmethod
    def forward(
        ctx: Any, tuned: Tuned, wanted: Wanted, node: Node, x: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.tuned, ctx.wanted, ctx.node, ctx.shape = tuned, wanted, node, tuple(x.shape)
        return OPS[node.op].forward(node, [x], tuned._params(node, {}))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        node, tuned, wanted = ctx.node, ctx.tuned, ctx.wanted
        if "bw" in wanted.looks and tuned._seen is not None:
            tuned._seen.setdefault(node.name, _Seen()).add("bw", dy)
        none, dx = Wanted(wanted.dx), [None]
        if any(wanted.dx):
            dx, _ = OPS[node.op].backward(node, dy, [], tuned._params(node, {}), none, [ctx.shape])
        return (None, None, None, *dx, None)


class _Seen:
    """Magnitudes of the input channels of a layer, and of those of the gradient of its output."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.samples = dict.fromkeys(SIDES, 0)

    def add(self, side: str, x: Tensor) -> None:
        more = len(x) * magnitudes(x.detach())
        self.sums[side] = self.sums[side] + more if side in self.sums else more
        self.samples[side] += len(x)

    def gates(self, node: Node, params: Mapping[str, Tensor], looks: tuple[str, ...]) -> Gates:
        if not all(side in self.sums for side in looks):
            raise UsageError(
                f"nothing passed {node.name!r} while it looked",
                hint="a forward and a backward pass of the samples, inside look()",
            )
        fw, bw = (
            gates(node, params, side, self.sums[side] / self.samples[side])
            if side in looks
            else None
            for side in SIDES
        )
        return fw, bw


class _Moments:
    """Mean and variance of the channels of samples that come a few at a time.

    Chan, Golub and LeVeque, 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """(n, C, ...), of n >= 1 samples."""
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        n = x.numel() // x.shape[1]
        share = n / (self.count + n)
        away = mean - self.mean.to(mean)
        self.mean = self.mean.to(mean) + share * away
        self.variance = (1 - share) * (
            self.variance.to(mean) + share * away * away
        ) + share * variance
        self.count += n


def _affine(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A norm as y = scale x + shift."""
    scale = p["weight"] * p["rstd"]
    return scale, p["bias"] - p["mean"] * scale


def _over_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def _keep(k: Kept, node: Node, inputs: Sequence[Tensor], y: Tensor, aux: Tensor | None) -> Tensor:
    if k.kind in ("value", "mask"):
        source = y if k.value == node.name else inputs[node.inputs.index(k.value)]
        return source if k.kind == "value" else pack_mask(OPS[node.op].mask(node, source))
    if k.kind == "channels":
        dim = -1 if node.op == "linear" else 1
        index = torch.tensor(k.channels, device=y.device)
        return inputs[0].index_select(dim, index)
    assert aux is not None
    return aux if k.kind == "stats" else pack_bits(aux.to(torch.uint8), k.bits)


def _restore(k: Kept, node: Node, t: Tensor, y_shape: tuple[int, ...]) -> Tensor:
    """What the operator's backward takes: masks and codes unpacked, the rest as it is."""
    if k.kind == "mask":
        return unpack_mask(t, y_shape)
    if k.kind == "code":
        return unpack_bits(t, k.bits, math.prod(y_shape)).reshape(y_shape).long()
    return t


def pack_mask(mask: Tensor) -> Tensor:
    """Booleans, packed 8 to a byte, the first in the lowest bit."""
    if mask.device.type != "cpu":
        return pack_bits(mask.to(torch.uint8), 1)
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    n = math.prod(shape)
    if packed.device.type != "cpu":
        return unpack_bits(packed, 1, n).reshape(shape).bool()
    bits = np.unpackbits(packed.numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2**bits, packed 8 // bits to a byte, the first in the lowest bits."""
    per = 8 // bits
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % per)).view(-1, per)
    shifts = torch.arange(per, device=values.device, dtype=torch.uint8) * bits
    return (flat << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).flatten()[:n]


def _overlay(full: Tensor, part: Tensor, s: Slice) -> Tensor:
    out = full.clone()
    rows = torch.arange(full.shape[0]) if s.out is None else torch.tensor(s.out)
    if s.inp is None:
        out[rows] = part.detach()
    else:
        out[rows[:, None], torch.tensor(s.inp)[None, :]] = part.detach()
    return out


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """Node -> the values that nothing after it reads."""
    release: dict[str, list[str]] = {n.name: [] for n in graph.nodes}
    for name, users in graph.consumers.items():
        if users and name != graph.output:
            release[users[-1].name].append(name)
    return release


def _frozen_clamps(graph: Graph, wanting: frozenset[str]) -> frozenset[str]:
    """Frozen clamps of a value that was made for them alone, which they may overwrite."""
    clamps = (n for n in graph.nodes if n.op == "clamp" and n.name not in wanting)
    makers = {n.name: graph.by_name.get(n.inputs[0]) for n in clamps}
    fresh = ("conv2d", "linear", "batch_norm", "add")
    return frozenset(
        clamp
        for clamp, maker in makers.items()
        if maker is not None
        and maker.op in fresh
        and maker.name not in wanting
        and len(graph.consumers[maker.name]) == 1
        and not graph.by_name[clamp].attrs.get("sign")
    )


def _boundary(graph: Graph, wanting: frozenset[str]) -> frozenset[str]:
    """What the input and the other nodes hand to nodes that take part in the backward pass."""
    others = {graph.input, *(n.name for n in graph.nodes)} - wanting
    read = {v for n in graph.nodes if n.name in wanting for v in n.inputs}
    return frozenset(others & read)


def _slot(name: str) -> str:
    """A name for a module attribute: without dots, and unlike any attribute of nn.Module."""
    return "state/" + name.replace(".", "/")
