"""Graph + selection -> Program: the forward, backward and update steps of one training step.

The program is what both sides read: `apply` takes from it what each node keeps, `memory` places
its buffers, `emit` prints its calls.  Dead gradients never appear: the backward pass visits a
node only if something at or before it is trained, and stops at the deepest trained layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate as running
from typing import Any, Literal

from modicum.errors import UsageError
from modicum.graph import Derived, Graph, Node, Param, Value
from modicum.ops import OPS, attention
from modicum.ops.base import (
    Arg,
    BackwardArgs,
    Buf,
    ByStep,
    Call,
    Const,
    Expr,
    ForwardArgs,
    Indices,
    Kept,
    Layout,
    Macs,
    Wanted,
    channels_last,
    count,
)
from modicum.ops.clamp import clamp_bounds
from modicum.ops.conv2d import is_depthwise, standardised
from modicum.ops.norm_conv2d import NormConv2d
from modicum.optim import SGD, Adam
from modicum.selection import Selection, Slice, Update, check_selection, some

Kind = Literal["weight", "optimizer", "accumulator", "activation", "saved", "gradient", "workspace"]
Phase = Literal["forward", "save", "loss", "backward", "update"]
Loss = Literal["cross_entropy", "mse"]
Order = Literal["dx-first", "dw-first"]

# A weight gradient is computed and applied in blocks of rows of about this size, so that no
# buffer of the weight's size is needed; a block is at least MIN_ROWS rows, the tile of the kernel.
BLOCK_BYTES = 8192
MIN_ROWS = 4


@dataclass(frozen=True)
class Buffer:
    """A piece of the arena.  Persistent buffers live from `init` on."""

    name: str
    bytes: int
    kind: Kind
    persistent: bool = False
    value: str = ""  # the graph's value or parameter that it holds


@dataclass(frozen=True)
class Step:
    """Some calls that run together; with `rows`, in a loop over blocks of `block` rows.

    A step of phase "update" with accumulation runs only after the last sample.
    """

    phase: Phase
    node: str
    calls: tuple[Call, ...]
    rows: int = 0
    block: int = 0

    @cached_property
    def reads(self) -> frozenset[str]:
        """Buffers read before a call of this step writes them."""
        written: set[str] = set()
        reads: set[str] = set()
        for call in self.calls:
            buffers = [a for a in call.args if isinstance(a, Buf)]
            reads |= {a.name for a in buffers if a.mode != "w" and a.name not in written}
            written |= {a.name for a in buffers if a.mode != "r"}
        return frozenset(reads)

    @cached_property
    def writes(self) -> frozenset[str]:
        args = (a for call in self.calls for a in call.args)
        return frozenset(a.name for a in args if isinstance(a, Buf) and a.mode != "r")

    @property
    def macs(self) -> int:
        return sum(call.macs for call in self.calls)


@dataclass(frozen=True)
class Trained:
    """A parameter slice that training changes, as it lives in RAM.

    The optimiser trains it, or, a `statistic`, the forward pass moves it.  `rates` are its step
    sizes relative to the optimiser's, one for each inner step of the plan.
    """

    param: str
    slice: Slice
    shape: tuple[int, ...]
    layout: Layout
    rates: tuple[float, ...]
    buffer: str
    statistic: bool = False

    def rate(self, step: int) -> float:
        """Of an inner step; from the last one on they stay as they are."""
        return self.rates[min(step, len(self.rates) - 1)]

    @property
    def size(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True)
class Program:
    """The steps of one training sample, in order, over named buffers.

    `graph` is the prepared graph (batch norms folded where nothing trains them).  `kept` and
    `wanted` say per node what stays for the backward pass and what it computes.  `trained` are
    the slices that the optimiser trains, `statistics` what norms move in the forward pass.

    A plan has one program for all `inner` steps that update the same slices.  Those of `trained`
    that other steps update lie in RAM all the same, and are read from there.

    Where layers have channel attention, a step passes its samples twice.  The program of the first
    pass, which `looks`, adds up the magnitudes by which channels are chosen and learns nothing.
    """

    graph: Graph
    loss: Loss
    optimizer: SGD | Adam
    accumulate: int
    order: Order
    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    trained: tuple[Trained, ...]
    statistics: tuple[Trained, ...]
    wanted: Mapping[str, Wanted]
    kept: Mapping[str, tuple[Kept, ...]]
    macs: Mapping[str, Macs]
    input_buffer: str
    output_buffer: str
    refresh: Call | None = None  # adds the sample that passed to the prototypes
    inner: tuple[int, ...] = (0,)
    looks: bool = False
    either: bool = False  # the other order makes another program

    @property
    def attends(self) -> bool:
        """Whether attention chooses channels of what is updated."""
        return any(attention.gated(n, self.wanted[n.name]) for n in self.graph.nodes)

    @property
    def updated(self) -> tuple[Trained, ...]:
        """Those of `trained` that these inner steps update."""
        return tuple(t for t in self.trained if t.rate(self.inner[0]))

    @property
    def learned(self) -> tuple[Trained, ...]:
        """All that training changes."""
        return (*self.trained, *self.statistics)

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes kept from the forward to the backward pass for one sample; each thing once."""
        return saved_bytes(self.graph, self.kept)

    @cached_property
    def lifetimes(self) -> dict[str, tuple[int, int]]:
        """First and last step of every buffer, both inclusive."""
        last = len(self.steps) - 1
        spans: dict[str, tuple[int, int]] = {}
        for i, step in enumerate(self.steps):
            for name in sorted(step.reads | step.writes):  # a set's order is the process's
                spans[name] = (spans.get(name, (i, i))[0], i)
        spans[self.input_buffer] = (0, spans.get(self.input_buffer, (0, 0))[1])
        for name, buffer in self.buffers.items():
            if buffer.persistent:
                spans[name] = (0, last)
        return spans


def saved_bytes(graph: Graph, kept: Mapping[str, tuple[Kept, ...]]) -> int:
    """Bytes kept for one sample; each thing once."""
    things = ((n, k) for n in graph.nodes for k in kept[n.name])
    return sum({saved_key(graph, n, k): k.bytes for n, k in things}.values())


def saved_key(graph: Graph, node: Node, kept: Kept) -> tuple[str, str]:
    """What is one buffer: a value under all its shapes, and each mask, code or part of a node."""
    if kept.kind != "value":
        return (kept.kind, node.name)
    value = kept.value
    while (by := graph.by_name.get(value)) is not None and OPS[by.op].view(graph, by):
        value = by.inputs[0]
    return (kept.kind, value)


def saved_name(kept: Kept, node: Node) -> str:
    """The buffer that holds a kept thing that is not simply a value."""
    return f"{kept.kind}:{node.name}"


def lower(
    graph: Graph,
    selection: Selection,
    optimizer: SGD | Adam,
    loss: Loss = "cross_entropy",
    accumulate: int = 1,
    order: Order = "dx-first",
    step: int = 0,
    look: bool = False,
) -> Program:
    """Lower one training step.

    `accumulate` gradients are accumulated before an update.  `order` says which of a layer's two
    gradients comes first when its weight is updated at once; the plan tries both.  The program is
    that of the inner step `step`, and of all that update the same; with `look` that of their first
    pass, where layers have channel attention.  Raises UsageError when the selection does not fit
    the graph.
    """
    check_selection(graph, selection)
    _check_modes(graph, selection)
    shape = graph.shape(graph.output)
    if len(shape) != 2 and (loss != "mse" or len(shape) != 3):
        raise UsageError(
            f"{loss} cannot be taken of an output of shape {shape}",
            hint="end the model with a flatten, so that its output is (n, outputs)",
        )
    prepared = prepare(graph, selection)
    updates = updates_of(selection)
    _refuse_what_is_not_there_yet(prepared, updates)
    _check_attention(prepared, updates, optimizer)
    wanted = wanted_gradients(prepared, updates, step, look)
    kept = choose_saved(prepared, wanted)
    low = _Lowering(prepared, selection, step, wanted, kept, optimizer, loss, accumulate, order)
    return low.program(looks=look)


def lower_inference(graph: Graph) -> Program:
    """The forward pass alone, everything frozen: its peak is the floor of every plan."""
    nothing = Selection(updates=())
    prepared = prepare(graph, nothing)
    wanted = {n.name: Wanted((False,) * len(n.inputs)) for n in prepared.nodes}
    kept: dict[str, tuple[Kept, ...]] = {n.name: () for n in prepared.nodes}
    low = _Lowering(prepared, nothing, 0, wanted, kept, SGD(), "cross_entropy", 1, "dx-first")
    return low.program(train=False)


def _check_modes(graph: Graph, selection: Selection) -> None:
    """`batch_norms` has to name batch norms, `sign` activations that a sign mask stands for."""
    for name in selection.batch_norms:
        _check_batch_norm(graph, name)
    for name in selection.probes:
        if name not in graph.by_name or name == graph.output or selection.probes.count(name) > 1:
            raise UsageError(
                f"{name!r} cannot be probed",
                why="a probe is of a node before the output, and a node has one",
            )
    for name in selection.sign:
        node = graph.by_name.get(name)
        if node is None or not OPS[node.op].takes_sign(node):
            able = [n.name for n in graph.nodes if OPS[n.op].takes_sign(n)]
            raise UsageError(
                f"{name!r} is no activation with a sign mask",
                why="relu, relu6, hardswish and silu have one",
                hint="the model's are " + (some(able) or "none"),
            )


def _check_batch_norm(graph: Graph, name: str) -> None:
    node = graph.by_name.get(name)
    if node is None or node.op != "batch_norm":
        norms = [n.name for n in graph.nodes if n.op == "batch_norm"]
        raise UsageError(
            f"{name!r} is no batch norm",
            hint="the model's are " + (some(norms) or "none: batch norms fold into convolutions"),
        )
    if not node.attrs["momentum"]:
        raise UsageError(
            f"{name!r} cannot follow the batch statistics",
            why="its momentum is None or 0, so its running statistics would not move",
            hint="set its momentum, for example to 0.1, before the capture",
        )


# ---- preparation -----------------------------------------------------------------------------


def prepare(graph: Graph, selection: Selection) -> Graph:
    """Write the selection's decisions into the graph's operators, for all inner steps alike.

    A batch norm whose statistics are frozen becomes part of the convolution before it: folded into
    its weight where the selection trains neither, one `norm_conv2d` where the weight is trained
    whole, and in every step that trains the norm's scale.  One that stays gets its missing scale
    and shift, and its 1 / sqrt(var + eps), as constants.  A frozen standardised weight becomes a
    constant; its convolution is not joined with a norm.  A layer whose weight no step trains loses
    its attention; one that keeps it is not joined with a norm.  Norms with batch statistics become
    `batch_stat_norm`; activations with a sign mask get the attribute `sign`.  A probed value passes
    through a `probe`.
    """
    updates = {u.param: u for u in selection.updates}
    attended = _attended(selection)
    params, nodes = dict(graph.params), []
    renamed: dict[str, str] = {}
    norm_of: dict[str, Node] = {}
    for node in graph.nodes:
        bn = _norm_after(graph, node, selection)
        if bn is not None and (
            _foldable(node, bn, updates) or _mergeable(graph, node, bn, updates)
        ):
            norm_of[node.name] = bn
            renamed[bn.name] = node.name
    for node in graph.nodes:
        if node.name in renamed:
            continue
        if attention.sides(node) and node.params["weight"] not in attended:
            node = attention.plain(node)
        changed: dict[str, Any] = {}
        if not renamed.keys().isdisjoint(node.inputs):
            changed["inputs"] = tuple(renamed.get(x, x) for x in node.inputs)
        bn = norm_of.get(node.name)
        if bn is not None and _foldable(node, bn, updates):
            changed["params"] = _fold(node, bn, params)
        elif bn is not None:
            changed["op"] = "norm_conv2d"
            changed["params"] = _merge(node, bn, params)
        elif node.name in selection.batch_norms:
            changed["op"] = "batch_stat_norm"
            changed["params"] = _complete(node, params, rstd=False)
        elif node.op == "batch_norm":
            changed["params"] = _complete(node, params)
        elif node.name in selection.sign:
            changed["attrs"] = {**node.attrs, "sign": True}
        elif standardised(node) and node.params["weight"] not in updates:
            changed["attrs"] = {k: v for k, v in node.attrs.items() if k != "standardise"}
            changed["params"] = _standardised_constant(node, params)
        nodes.append(node.model_copy(update=changed) if changed else node)  # copies cost time
    values = dict(graph.values)
    if selection.probes:
        probed = {renamed.get(v, v): fisher_of(v) for v in selection.probes}
        nodes = _with_probes(nodes, probed, values, params)
    used = {name for node in nodes for name in node.params.values()}
    alive = {graph.input, *(n.name for n in nodes)}
    return Graph.model_construct(
        # not validated again: it is made of a graph that was, and a search makes many
        input=graph.input,
        output=renamed.get(graph.output, graph.output),
        values={k: v for k, v in values.items() if k in alive},
        params={k: v for k, v in params.items() if k in used},
        nodes=tuple(nodes),
    )


def _attended(selection: Selection) -> set[str]:
    """The updated weights whose channels attention chooses."""
    return set(selection.attended) & {u.param for u in selection.updates}


def updates_of(selection: Selection) -> dict[str, Update]:
    """By parameter, scores of probes included."""
    probed = (Update(param=fisher_of(name)) for name in selection.probes)
    return {u.param: u for u in (*selection.updates, *probed)}


def fisher_of(value: str) -> str:
    """The parameter that stands for the Fisher scores of a probed value's channels."""
    return f"{value}.fisher"


def _with_probes(
    nodes: list[Node], probed: Mapping[str, str], values: dict[str, Value], params: dict[str, Param]
) -> list[Node]:
    """Put a probe behind each probed value; what read the value reads the probe."""
    made = []
    for node in nodes:
        inputs = tuple(f"probe:{v}" if v in probed else v for v in node.inputs)
        made.append(node.model_copy(update={"inputs": inputs}))
        if node.name in probed:
            name, score = f"probe:{node.name}", probed[node.name]
            if name in values or score in params:  # what a plan says of its graph may be anything
                raise UsageError(f"the graph has {name} or {score}, the name of a probe")
            shape = values[node.name].shape
            channels = shape[1] if len(shape) == 4 else shape[-1]
            zero = Derived(kind="full", fill=0.0)
            params[score] = Param(name=score, shape=(channels,), trainable=False, derived=zero)
            values[name] = Value(name=name, shape=shape)
            roles = {"fisher": score}
            made.append(Node(name=name, op="probe", inputs=(node.name,), params=roles))
    return made


def _norm_after(graph: Graph, node: Node, selection: Selection) -> Node | None:
    """The batch norm with frozen statistics that alone reads a convolution or linear layer.

    None where that layer's own output is probed.
    """
    if node.op not in ("conv2d", "linear") or len(graph.consumers[node.name]) != 1:
        return None
    if standardised(node) or node.name in selection.probes:
        return None
    if attention.sides(node) and node.params["weight"] in _attended(selection):
        return None
    (bn,) = graph.consumers[node.name]
    if bn.op != "batch_norm" or node.name == graph.output or len(graph.shape(node.name)) == 3:
        return None
    return None if bn.name in selection.batch_norms else bn


def _foldable(node: Node, bn: Node, updates: Mapping[str, Update]) -> bool:
    return not any(name in updates for name in (*node.params.values(), *bn.params.values()))


def _mergeable(graph: Graph, node: Node, bn: Node, updates: Mapping[str, Update]) -> bool:
    """The convolution's weight is trained whole, its bias not, the norm's entries whole or not.

    The norm's scale is not trained in a step without the weight: see `NormConv2d`.
    """
    if node.op != "conv2d" or node.params["weight"] not in updates:
        return False
    weight, scale = updates[node.params["weight"]], updates.get(bn.params.get("weight", ""))
    if scale is not None:
        steps = range(max(len(weight.rates), len(scale.rates)))
        if any(scale.rate(k) and not weight.rate(k) for k in steps):
            return False
    names = [node.params["weight"], *bn.params.values()]
    slices = [_normal(updates[n].slice, graph.params[n].shape) for n in names if n in updates]
    shared = any(len(graph.users_of(n)) > 1 for n in names)
    return node.params.get("bias") not in updates and all(s.whole for s in slices) and not shared


def _merge(node: Node, bn: Node, params: dict[str, Param]) -> dict[str, str]:
    norm = _complete(bn, params)
    roles = {"scale": "weight", "shift": "bias", "mean": "mean", "rstd": "rstd"}
    return {**node.params, **{role: norm[name] for role, name in roles.items()}}


def _fold(node: Node, bn: Node, params: dict[str, Param]) -> dict[str, str]:
    weight = params[node.params["weight"]]
    sources = {"weight": weight.name, **{f"bn_{r}": p for r, p in bn.params.items()}}
    if "bias" in node.params:
        sources["bias"] = node.params["bias"]
    eps = float(bn.attrs["eps"] or 0.0)
    roles = {}
    for role, kind, shape in (
        ("weight", "fold_weight", weight.shape),
        ("bias", "fold_bias", weight.shape[:1]),
    ):
        name = f"{node.name}.{role}*{bn.name}"
        derived = Derived.model_validate({"kind": kind, "sources": sources, "eps": eps})
        params[name] = Param(name=name, shape=shape, trainable=False, derived=derived)
        roles[role] = name
    return roles


def _standardised_constant(node: Node, params: dict[str, Param]) -> dict[str, str]:
    weight = params[node.params["weight"]]
    name = f"{node.name}.weight*standardised"
    sources = {"weight": weight.name}
    derived = Derived(kind="standardise", sources=sources, eps=standardised(node))
    params[name] = Param(name=name, shape=weight.shape, trainable=False, derived=derived)
    return {**node.params, "weight": name}


def _complete(node: Node, params: dict[str, Param], rstd: bool = True) -> dict[str, str]:
    roles = dict(node.params)
    shape = params[roles["var"]].shape
    constants = {
        "weight": Derived(kind="full", fill=1.0),
        "bias": Derived(kind="full", fill=0.0),
        "rstd": Derived(
            kind="rstd", sources={"bn_var": roles["var"]}, eps=float(node.attrs["eps"] or 0.0)
        ),
    }
    for role, derived in constants.items():
        if role not in roles and (rstd or role != "rstd"):
            name = f"{node.name}.{role}"
            params[name] = Param(name=name, shape=shape, trainable=False, derived=derived)
            roles[role] = name
    return roles


def _refuse_what_is_not_there_yet(graph: Graph, updates: Mapping[str, Update]) -> None:
    for name, update in updates.items():
        users = graph.users_of(name)
        if len(users) != 1:
            where = ", ".join(node.name for node, _ in users)
            raise UsageError(
                f"{name!r} is shared by {len(users)} nodes and cannot be trained yet",
                where=where,
                hint="leave it out of the selection",
            )
        (node, role) = users[0]
        part = _normal(update.slice, graph.params[name].shape)
        if role == "weight" and standardised(node) and not part.whole:
            raise UsageError(
                f"{name!r} can only be trained whole",
                where=node.name,
                why="it is standardised over all its entries",
            )


def _check_attention(graph: Graph, updates: Mapping[str, Update], optimizer: SGD | Adam) -> None:
    """A layer with attention is updated whole, weight and bias together, by plain SGD."""
    for node in graph.nodes:
        if not attention.sides(node):
            continue
        weight, bias = (updates.get(node.params.get(r, "")) for r in ("weight", "bias"))
        assert weight is not None
        steps = range(max(len(u.rates) for u in (weight, bias) if u is not None))
        whole = all(
            _normal(u.slice, graph.params[u.param].shape).whole for u in (weight, bias) if u
        )
        if not whole or (bias and any(bias.rate(k) and not weight.rate(k) for k in steps)):
            raise UsageError(
                f"{node.name!r} has channel attention, which chooses what is updated of it",
                why="it takes the whole weight, and the bias in no step without the weight",
                hint="no slices of it, or the model without its attention",
            )
        if standardised(node):
            raise UsageError(
                f"{node.name!r} has channel attention, and its weight is standardised",
                why="its gradient goes through all entries, not those of some channels",
                hint="the model without its attention, or a method that leaves the layer out",
            )
        if not isinstance(optimizer, SGD) or optimizer.momentum or optimizer.weight_decay:
            raise UsageError(
                f"{node.name!r} has channel attention, which goes with plain SGD",
                why="what is not chosen stays as it is; another optimiser would move it",
                hint="SGD without momentum and weight decay",
            )


def wanted_gradients(
    graph: Graph, updates: Mapping[str, Update], step: int = 0, look: bool = False
) -> dict[str, Wanted]:
    """Per node, which gradients it owes in the inner step `step`.

    Back-propagation stops at the deepest layer that is trained in it; in a pass that looks, at the
    deepest whose attention reads the gradient of its output.
    """
    needs: set[str] = set()
    wanted = {}
    idle = [Wanted((False,) * n) for n in range(3)]  # most nodes, of which a search asks often
    for node in graph.nodes:
        if needs.isdisjoint(node.inputs) and updates.keys().isdisjoint(node.params.values()):
            n = len(node.inputs)
            wanted[node.name] = idle[n] if n < len(idle) else Wanted((False,) * n)
            continue
        params = {}
        for role in OPS[node.op].roles:
            update = updates.get(node.params.get(role, ""))
            if update is not None and update.rate(step):
                full = graph.params[update.param].shape
                params[role] = _normal(update.slice, full)
        dx = tuple(x in needs for x in node.inputs)
        looks = attention.sides(node) if look and "weight" in params else ()
        wanted[node.name] = Wanted(dx, {} if look else params, looks)
        if wanted[node.name].any:
            needs.add(node.name)
    return wanted


def _normal(s: Slice, full: tuple[int, ...]) -> Slice:
    """A list of all channels is the same as no list."""
    out = None if s.out is None or len(s.out) == full[0] else s.out
    inp = None if s.inp is None or len(s.inp) == full[1] else s.inp
    return Slice(out=out, inp=inp)


def choose_saved(graph: Graph, wanted: Mapping[str, Wanted]) -> dict[str, tuple[Kept, ...]]:
    """What each node keeps.  A mask of an output that another node keeps whole is read from it."""
    kept = {n.name: OPS[n.op].saved(graph, n, wanted[n.name]) for n in graph.nodes}
    whole = {k.value for ks in kept.values() for k in ks if k.kind == "value"}
    for name, ks in kept.items():
        if ks and ks[0].kind == "mask" and ks[0].value == name and name in whole:
            size, why = graph.values[name].bytes, "shared with the next layer"
            kept[name] = (Kept("value", name, size, why=why, shared=True),)
    return kept


# ---- lowering --------------------------------------------------------------------------------


class _Lowering:
    """Builds the steps of one program; used once."""

    def __init__(
        self,
        graph: Graph,
        selection: Selection,
        step: int,
        wanted: Mapping[str, Wanted],
        kept: Mapping[str, tuple[Kept, ...]],
        optimizer: SGD | Adam,
        loss: Loss,
        accumulate: int,
        order: Order,
    ) -> None:
        self.graph, self.wanted, self.kept = graph, wanted, kept
        self.updates = updates_of(selection)
        self.inner_steps, self.patterns = selection.inner_steps, selection.patterns
        self.inner = next(p for p in self.patterns if min(step, self.inner_steps - 1) in p)
        self.either = False
        self.optimizer, self.loss, self.accumulate, self.order = optimizer, loss, accumulate, order
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.trained: dict[str, Trained] = {}
        self.where: dict[str, str] = {}  # value -> buffer
        self.grad: dict[str, str] = {}  # value -> gradient buffer
        self.pending: dict[str, set[str]] = {}  # gradient buffer -> values still to read it
        self.whole = {k.value for ks in kept.values() for k in ks if k.kind == "value"}
        index = {n.name: i for i, n in enumerate(graph.nodes)}
        self.last_use = {
            v: max((index[n.name] for n in users), default=-1)
            for v, users in graph.consumers.items()
        }
        self.last_use[graph.output] = len(graph.nodes)
        self.fused = self._fused_clamps()

    def program(self, train: bool = True, looks: bool = False) -> Program:
        self._trained_parameters()
        self._statistics()
        source = self.graph.input
        self.where[source] = self._buffer(source, self.graph.values[source].bytes, "activation")
        for i, node in enumerate(self.graph.nodes):
            self._forward(i, node)
        output = self.where[self.graph.output]
        if train:
            self._loss(output)
            for node in self.graph.nodes:
                if OPS[node.op].states and not looks:
                    self._step("backward", node.name, self._follow(node))
            for node in reversed(self.graph.nodes):
                if node.name in self.grad:
                    self._backward(node)
            for node in self.graph.nodes:
                for side in self.wanted[node.name].looks:
                    self._choose(node, side)
        return Program(
            graph=self.graph,
            loss=self.loss,
            optimizer=self.optimizer,
            accumulate=self.accumulate,
            order=self.order,
            either=self.either,
            buffers=self._with_kinds(),
            steps=tuple(self.steps),
            trained=tuple(t for t in self.trained.values() if not t.statistic),
            statistics=tuple(t for t in self.trained.values() if t.statistic),
            wanted=self.wanted,
            kept=self.kept,
            macs={n.name: self._macs(n) for n in self.graph.nodes},
            input_buffer=self.where[source],
            output_buffer=output,
            refresh=self._refresh(),
            inner=self.inner,
            looks=looks,
        )

    def _refresh(self) -> Call | None:
        """Read right after a forward pass, when the embedding is still in its buffer."""
        last = self.graph.by_name.get(self.graph.output)
        if last is None or not OPS[last.op].refreshed:
            return None
        x = tuple(self.where[v] for v in last.inputs)
        params = self._whole_operands(last)
        return OPS[last.op].c_refresh(ForwardArgs(last, self.graph, x, "", params))

    def _macs(self, node: Node) -> Macs:
        op, wanted = OPS[node.op], self.wanted[node.name]
        size = self.graph.values[node.name].size
        forward, backward = (round(size * k) for k in op.elementwise(self.graph, node, wanted))
        return replace(op.macs(self.graph, node, wanted), others=(forward, backward))

    # ---- buffers ----

    def _buffer(
        self, name: str, size: int, kind: Kind, persistent: bool = False, value: str = ""
    ) -> str:
        while name in self.buffers:
            name += "'"
        self.buffers[name] = Buffer(name, size, kind, persistent, value or name)
        return name

    def _with_kinds(self) -> dict[str, Buffer]:
        """Activations that survive into the backward pass are saved ones."""
        kinds = {self.where[v] for v in self.whole}
        return {
            name: replace(b, kind="saved") if name in kinds and b.kind == "activation" else b
            for name, b in self.buffers.items()
        }

    def _trained_parameters(self) -> None:
        """What any inner step trains: all of it in RAM, at the same place in all programs."""
        for node in self.graph.nodes:
            for role in OPS[node.op].roles:
                name = node.params.get(role, "")
                update = self.updates.get(name)
                if update is None:
                    continue
                full = self.graph.params[name].shape
                s = _normal(update.slice, full)
                layout = OPS[node.op].layout(self.graph, node, role)
                rates = tuple(map(update.rate, range(self.inner_steps)))
                trained = Trained(name, s, s.shape(full), layout, rates, f"w:{name}")
                size = 4 * trained.size
                self._buffer(trained.buffer, size, "weight", True, name)
                for state in self.optimizer.states:
                    self._buffer(f"{state}:{name}", size, "optimizer", True, name)
                if self.accumulate > 1:
                    size = 4 * self._gradient_size(node, trained)
                    self._buffer(f"g:{name}", size, "accumulator", True, name)
                self.trained[name] = trained
            for side in attention.sides(node):
                for what in ("sums", "gates"):
                    size = 4 * attention.channels(self.graph, node, side)
                    self._buffer(f"{what}:{node.name}.{side}", size, "accumulator", True)

    def _gradient_size(self, node: Node, trained: Trained) -> int:
        """Floats of a gradient: of what attention can choose at most, or of all of the slice."""
        if not attention.sides(node):
            return trained.size
        return math.prod(attention.worst(self.graph, node).shape(trained.shape))

    def _statistics(self) -> None:
        for node in self.graph.nodes:
            for role in (*OPS[node.op].states, *OPS[node.op].refreshed):
                name = node.params[role]
                shape = self.graph.params[name].shape
                t = Trained(name, Slice(), shape, "plain", (), f"w:{name}", statistic=True)
                self._buffer(t.buffer, 4 * t.size, "weight", True, name)
                self.trained[name] = t

    def _step(self, phase: Phase, node: str, *calls: Call, rows: int = 0, block: int = 0) -> None:
        self.steps.append(Step(phase, node, calls, rows, block))

    # ---- forward ----

    def _fused_clamps(self) -> dict[str, Node]:
        """Producer -> the clamp that its kernel applies while storing the output."""
        fused = {}
        for node in self.graph.nodes:
            users = self.graph.consumers[node.name]
            if (
                OPS[node.op].clamps
                and len(users) == 1
                and users[0].op == "clamp"
                and node.name != self.graph.output
            ):
                fused[node.name] = users[0]
        return fused

    def _forward(self, i: int, node: Node) -> None:
        op = OPS[node.op]
        for kept in self.kept[node.name]:  # before the node may overwrite its input
            if kept.kind == "channels":
                self._save_channels(node, kept)
            elif kept.kind == "gated":
                name = self._buffer(saved_name(kept, node), kept.bytes, "saved", value=kept.value)
                self._gather_gated("save", node, name, self.where[kept.value], "fw")
            elif kept.kind == "mask" and kept.value != node.name:
                self._save_mask(node, kept)
        if "fw" in self.wanted[node.name].looks:
            self._magnitudes("save", node, "fw", self.where[node.inputs[0]], node.inputs[0])
        clamp = self.fused.get(node.name)
        produced_by_fusion = node.op == "clamp" and node.inputs[0] in self.fused
        if produced_by_fusion or op.view(self.graph, node):
            self.where[node.name] = self.where[node.inputs[0]]
        else:
            params = self._operands("forward", node)
            x = tuple(self.where[v] for v in node.inputs)
            y = self._output_buffer(i, node)
            self.where[node.name] = y
            lo, hi = clamp_bounds(clamp) if clamp else (None, None)
            args = ForwardArgs(node, self.graph, x, y, params, _number(lo), _number(hi))
            aux = next((k for k in self.kept[node.name] if k.kind in ("code", "stats")), None)
            if aux is not None:
                name = self._buffer(saved_name(aux, node), aux.bytes, "saved", value=node.name)
                calls = op.c_forward_saving(args, Buf(name, "w", training=True))
            else:
                calls = op.c_forward(args)
            self._step("forward", node.name, *calls)
        for kept in self.kept[node.name]:
            if kept.kind == "mask" and kept.value == node.name:
                self._save_mask(node, kept)

    def _output_buffer(self, i: int, node: Node) -> str:
        for position in OPS[node.op].inplace(self.graph, node):
            buffer = self.where[node.inputs[position]]
            aliases = [v for v, b in self.where.items() if b == buffer]
            free = all(self.last_use[v] <= i and v not in self.whole for v in aliases)
            same_size = self.buffers[buffer].bytes == self.graph.values[node.name].bytes
            others = [self.where[x] for p, x in enumerate(node.inputs) if p != position]
            if free and same_size and (buffer not in others or node.op == "add"):
                return buffer
        return self._buffer(node.name, self.graph.values[node.name].bytes, "activation")

    def _save_mask(self, node: Node, kept: Kept) -> None:
        name = self._buffer(saved_name(kept, node), kept.bytes, "saved", value=node.name)
        source = Buf(self.where[kept.value])
        call = OPS[node.op].c_mask(self.graph, node, Buf(name, "w"), source)
        self._step("save", node.name, call)

    def _save_channels(self, node: Node, kept: Kept) -> None:
        assert kept.channels is not None
        name = self._buffer(saved_name(kept, node), kept.bytes, "saved", value=kept.value)
        shape = self.graph.shape(kept.value)
        self._gather("save", node, name, self.where[kept.value], kept.channels, shape)

    def _gather(
        self,
        phase: Phase,
        node: Node,
        dst: str,
        src: str,
        channels: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:
        rows, cols = channels_last(shape)
        args = (Buf(dst, "w"), Buf(src), Indices(channels), rows, cols, len(channels))
        self._step(phase, node.name, Call("mo_gather", args))

    def _operands(self, phase: Phase, node: Node) -> dict[str, Arg]:
        """The node's parameters as kernel arguments.

        A frozen one is a constant, a trained one its buffer.  Of a trained slice only the slice
        is in RAM: the whole parameter is put together in a buffer for the time of the call.
        """
        operands: dict[str, Arg] = {}
        for role, name in node.params.items():
            layout = OPS[node.op].layout(self.graph, node, role)
            trained = self.trained.get(name)
            if trained is None:
                operands[role] = Const(name, layout)
            elif role == "weight" and standardised(node):
                operands[role] = Buf(self._standardised(phase, node, trained))
            elif trained.slice.whole:
                operands[role] = Buf(trained.buffer)
            else:
                if phase == "backward" and role == "bias":
                    continue
                operands[role] = Buf(self._assemble(phase, node, trained))
        return operands

    def _assemble(self, phase: Phase, node: Node, trained: Trained) -> str:
        param = self.graph.params[trained.param]
        full = self._buffer(f"full:{trained.param}", param.bytes, "workspace", value=param.name)
        s, shape = trained.slice, param.shape
        base = Const(param.name, trained.layout)
        if trained.layout == "hwc":  # the channel is the last dimension in memory
            taps, rows, cols, out, inp = 1, shape[2] * shape[3], shape[0], None, s.out
        else:
            taps = shape[2] * shape[3] if len(shape) == 4 else 1
            rows, cols = shape[0], shape[1] if len(shape) > 1 else 1
            out, inp = s.out, s.inp
        args = (
            *(Buf(full, "w"), base, Buf(trained.buffer)),
            *(Indices(out), count(out, rows), Indices(inp), count(inp, cols)),
            *(rows, taps, cols),
        )
        self._step(phase, node.name, Call("mo_assemble", args))
        return full

    def _standardised(self, phase: Phase, node: Node, trained: Trained) -> str:
        """The standardised weight, computed for the time of a call from the one that is trained.

        A depthwise weight, [tap][channel] in memory, is turned so that a channel is a row.
        """
        rows, entries = trained.shape[0], trained.size // trained.shape[0]
        full = self._workspace("full", trained)
        source, dst, calls = trained.buffer, full, []
        if trained.layout == "hwc":
            source, dst = full, self._workspace("turned", trained)
            calls.append(Call("mo_transpose", (Buf(full, "w"), Buf(trained.buffer), entries, rows)))
        args = (Buf(dst, "w"), Buf(source), rows, entries, standardised(node))
        calls.append(Call("mo_standardise", args))
        if trained.layout == "hwc":
            calls.append(Call("mo_transpose", (Buf(full, "w"), Buf(dst), rows, entries)))
        self._step(phase, node.name, *calls)
        return full

    def _through_standardisation(
        self, node: Node, role: str, grad: str, looped: bool
    ) -> tuple[Call, ...]:
        """The calls that make the gradient of a standardised weight that of the trained one.

        In a loop they do a block of rows; a depthwise weight has no such blocks.
        """
        if role != "weight" or not standardised(node):
            return ()
        trained = self.trained[node.params["weight"]]
        rows, entries, eps = trained.shape[0], trained.size // trained.shape[0], standardised(node)
        if trained.layout != "hwc":
            weight = Buf(trained.buffer, rows=entries if looped else 0)
            n: Arg = Expr("row_end - row") if looped else rows
            return (Call("mo_standardise_dw", (Buf(grad, "rw"), weight, n, entries, eps)),)
        w, g = (self._workspace(name, trained) for name in ("turned", "g turned"))
        return (
            Call("mo_transpose", (Buf(w, "w"), Buf(trained.buffer), entries, rows)),
            Call("mo_transpose", (Buf(g, "w"), Buf(grad), entries, rows)),
            Call("mo_standardise_dw", (Buf(g, "rw"), Buf(w), rows, entries, eps)),
            Call("mo_transpose", (Buf(grad, "w"), Buf(g), rows, entries)),
        )

    def _workspace(self, name: str, trained: Trained) -> str:
        size = 4 * trained.size
        return self._buffer(f"{name}:{trained.param}", size, "workspace", value=trained.param)

    # ---- loss ----

    def _loss(self, output: str) -> None:
        value = self.graph.values[self.graph.output]
        aliases = {v for v, b in self.where.items() if b == output}
        if aliases & self.whole:  # the output itself is kept: its gradient needs a place of its own
            copy = self._buffer("dlogits", value.bytes, "gradient", value=value.name)
            n = value.size
            call = Call("mo_copy_blocks", (Buf(copy, "w"), n, Buf(output), n, 1, n, 0))
            self._step("loss", self.graph.output, call)
            output = copy
        z = Buf(output, "rw")
        scale = 1.0 / self.accumulate
        if self.loss == "mse":
            args: tuple[Arg, ...] = (z, Expr("target"), value.size, scale)
            self._step("loss", self.graph.output, Call("mo_mse", args))
        else:
            args = (z, value.size, Expr("label"), scale)
            self._step("loss", self.graph.output, Call("mo_cross_entropy", args))
        if self.wanted[self.graph.output].any:
            self.grad[self.graph.output] = output
            self.pending[output] = {self.graph.output}

    # ---- backward ----

    def _follow(self, node: Node) -> Call:
        return OPS[node.op].c_follow(self._backward_args(node, dy=""))

    def _backward(self, node: Node) -> None:
        dy = self.grad[node.name]
        self.pending[dy].discard(node.name)
        wanted = self.wanted[node.name]
        if "bw" in wanted.looks:
            self._magnitudes("backward", node, "bw", dy, node.name)
        if attention.gated(node, wanted):
            self._with_attention(node, dy)
            return
        for role in wanted.params:
            if role not in ("weight", "scale"):
                self._gradient(node, role, dy)
        if "scale" in wanted.params:
            self._with_scale(node, dy)
            return
        if node.op == "norm_conv2d" and (any(wanted.dx) or "weight" in wanted.params):
            dy = self._scaled(node, dy, copy=bool(self.pending[dy]))
        if "weight" not in wanted.params:
            self._input_gradients(node, dy)
        elif self._gradient_first(node):
            grad = self._gradient(node, "weight", dy, update=False)
            self._input_gradients(node, dy)
            self._update(node, "weight", grad)
        else:
            self._input_gradients(node, dy)
            self._gradient(node, "weight", dy)

    def _with_scale(self, node: Node, dy: str) -> None:
        """Weight, scale and input of a norm_conv2d whose scale is trained.

        The convolution is passed dy * scale * rstd; the scale's own gradient needs dy as it is.
        So the weight's gradient comes from dy, is finished row by row, and gives the scale's
        gradient on the way; dx comes from a scaled copy, or, where the whole gradient is computed
        first, from dy scaled in place.
        """
        op = OPS[node.op]
        assert isinstance(op, NormConv2d)
        wanted = self.wanted[node.name]
        scale = self.trained[node.params["scale"]]
        accumulate = self.accumulate > 1
        grad_scale = f"g:{scale.param}"
        if not accumulate:
            grad_scale = self._buffer(grad_scale, 4 * scale.size, "gradient", value=scale.param)
        target = Buf(grad_scale, "rw" if accumulate else "w")
        start = op.c_scale_grad(self._backward_args(node, dy), target, accumulate)
        self._step("backward", node.name, start)
        if self._gradient_first(node):
            grad = self._gradient(node, "weight", dy, update=False)
            if any(wanted.dx):
                scaled = self._scaled(node, dy, copy=bool(self.pending[dy]))
                self._input_gradients(node, scaled)
            weight = self.trained[node.params["weight"]]
            finish = self._finish(node, dy, grad, weight.buffer, grad_scale, looped=False)
            self._update(node, "weight", grad, before=(finish,))
        else:
            if any(wanted.dx):
                self._input_gradients(node, self._scaled(node, dy, copy=True))
            self._gradient(node, "weight", dy, finish=grad_scale)
        self._update(node, "scale", grad_scale)

    # ---- channel attention ----

    def _magnitudes(self, phase: Phase, node: Node, side: str, buffer: str, value: str) -> None:
        """Add |x| or |dy| of each channel to the sums that gates are made of."""
        sums = Buf(f"sums:{node.name}.{side}", "rw")
        shape = channels_last(self.graph.shape(value))
        self._step(phase, node.name, Call("mo_magnitudes", (sums, Buf(buffer), *shape)))

    def _choose(self, node: Node, side: str) -> None:
        """The gates of a side from its sums, which begin anew."""
        params = [node.params[role] for role in attention.roles_of(side)]
        hidden, channels = self.graph.params[params[0]].shape
        space = self._buffer(f"hidden:{node.name}.{side}", 4 * hidden, "workspace")
        pixels, _ = channels_last(self.graph.shape(node.inputs[0] if side == "fw" else node.name))
        gates, sums = (Buf(f"{what}:{node.name}.{side}", "rw") for what in ("gates", "sums"))
        branch = (Const(name) for name in params)
        mean, rho = 1.0 / (self.accumulate * pixels), float(node.attrs["rho"])
        most = attention.most(self.graph, node, side)
        args: tuple[Arg, ...] = (replace(gates, mode="w"), sums, Buf(space, "w"), *branch)
        self._step(
            "update", node.name, Call("mo_gates", (*args, channels, hidden, mean, rho, most))
        )

    def _gather_gated(self, phase: Phase, node: Node, dst: str, src: str, side: str) -> None:
        value = node.inputs[0] if side == "fw" else node.name
        most = attention.most(self.graph, node, side)
        args = (Buf(dst, "w"), Buf(src), Buf(f"gates:{node.name}.{side}"))
        shape = channels_last(self.graph.shape(value))
        self._step(phase, node.name, Call("mo_gather_gated", (*args, *shape, most)))

    def _with_attention(self, node: Node, dy: str) -> None:
        """Gradients of the chosen channels alone, of which the weight and the bias are updated."""
        first = self._gradient_first(node)
        if not first:
            self._input_gradients(node, dy)
        roles = sorted(self.wanted[node.name].params)
        grads = {role: self._gated_gradient(node, role, dy) for role in roles}
        if first:
            self._input_gradients(node, dy)
        for role, grad in grads.items():
            self._gated_update(node, role, grad)

    def _gated_gradient(self, node: Node, role: str, dy: str) -> str:
        trained = self.trained[node.params[role]]
        accumulate = self.accumulate > 1
        grad = f"g:{trained.param}"
        if not accumulate:
            size = 4 * self._gradient_size(node, trained)
            grad = self._buffer(grad, size, "gradient", value=trained.param)
        fw, bw = self._gates(node)
        args = replace(self._backward_args(node, dy), gates=(fw, bw))
        if role == "weight" and bw is not None and OPS[node.op].gathers_gated(node):
            rows, _ = channels_last(self.graph.shape(node.name))
            most = attention.most(self.graph, node, "bw")
            part = self._buffer(f"rows:{node.name}", 4 * rows * most, "workspace")
            self._gather_gated("backward", node, part, dy, "bw")
            args = replace(args, dy=part)
        target = Buf(grad, "rw" if accumulate else "w")
        self._step("backward", node.name, OPS[node.op].c_gated(args, role, target, accumulate))
        return grad

    def _gated_update(self, node: Node, role: str, grad: str) -> None:
        """Of the chosen entries; those of a depthwise weight are [tap][channel] in memory."""
        trained = self.trained[node.params[role]]
        out, inp, *taps = (*trained.shape, 1)
        area = math.prod(taps)
        strides = (1, out) if trained.layout == "hwc" else (area * inp, inp)
        fw, bw = self._gates(node)
        if role == "bias":
            fw = None
        most_in = inp if fw is None else attention.most(self.graph, node, "fw")
        args = (
            *(Buf(trained.buffer, "rw"), Buf(grad), fw, bw, out, area, inp, *strides),
            *(attention.most(self.graph, node, "bw"), most_in),
        )
        calls = [Call("mo_gated_step", (*args, self._learning_rate(trained)))]
        if self.accumulate > 1:
            size = self.buffers[grad].bytes
            calls.append(Call("memset", (Buf(grad, "w"), 0, size)))
        self._step("update", node.name, *calls, rows=1, block=1)

    def _gates(self, node: Node) -> tuple[Buf | None, Buf | None]:
        """Of the input and of the output channels; None for a side without attention."""
        fw, bw = (
            Buf(f"gates:{node.name}.{side}") if side in attention.sides(node) else None
            for side in attention.SIDES
        )
        return fw, bw

    def _scaled(self, node: Node, dy: str, copy: bool) -> str:
        """dy * scale * rstd, in place or in a buffer of its own."""
        op = OPS[node.op]
        assert isinstance(op, NormConv2d)
        dx = dy
        if copy:
            size = self.graph.values[node.name].bytes
            dx = self._buffer(f"scaled:{node.name}", size, "gradient", value=node.name)
        call = op.c_scaled(replace(self._backward_args(node, dy), dx=dx))
        self._step("backward", node.name, call)
        self.pending.setdefault(dx, set())
        return dx

    def _finish(
        self, node: Node, dy: str, grad: str, weight: str, grad_scale: str, looped: bool
    ) -> Call:
        """The call that turns G into the weight's gradient, for a block of rows or for all."""
        op = OPS[node.op]
        assert isinstance(op, NormConv2d)
        shape = self.graph.params[node.params["weight"]].shape
        out_c, in_g, kh, kw = shape
        depthwise = is_depthwise(self.graph, node)
        row_elems = kw * out_c if depthwise else in_g * kh * kw
        taps: Arg = Expr(f"(row_end - row) * {kw}") if looped else kh * kw
        rows: tuple[Arg, Arg] = (Expr("row"), Expr("row_end")) if looped else (0, out_c)
        w = Buf(weight, "r", rows=row_elems if looped else 0)
        args = self._backward_args(node, dy)
        return op.c_finish(args, Buf(grad, "rw"), w, Buf(grad_scale, "rw"), (*rows, taps))

    def _gradient_first(self, node: Node) -> bool:
        """Whether a weight's whole gradient is computed before the input gradient.

        It must be where gradients are accumulated over samples anyway, and where the input
        gradient overwrites dy.  Otherwise, with the input gradient out of the way, the weight
        can be updated block by block; which of the two takes less room depends on the layer
        sizes, so both orders are tried.  Either way the weight changes after dx was computed.
        """
        if not any(self.wanted[node.name].dx):
            return self.accumulate > 1
        if self.accumulate > 1 or OPS[node.op].dx_inplace(self.graph, node, 0):
            return True
        self.either = True
        return self.order == "dw-first"

    def _input_gradients(self, node: Node, dy: str) -> None:
        op = OPS[node.op]
        wanted = self.wanted[node.name]
        for i, v in enumerate(node.inputs):
            if not wanted.dx[i]:
                continue
            last = not any(wanted.dx[i + 1 :])  # until then dy is still to be read
            if op.passes_gradient(self.graph, node):
                self._pass_on(node, v, dy, last)
            elif op.dx_inplace(self.graph, node, i):
                self._in_place(node, i, v, dy, last)
            else:
                self._computed(node, i, v, dy, last)

    def _pass_on(self, node: Node, v: str, dy: str, last: bool) -> None:
        """The gradient of v is dy itself: share the buffer, or add it to what v has.

        What v has may lie in dy's buffer, which only the last input may change.
        """
        if v not in self.grad:
            self._own(v, dy)
            return
        mine = self._writable(node, v, "" if last else dy)
        n = self.graph.values[v].size
        args = (Buf(mine, "rw"), Buf(mine), Buf(dy), n, Expr("MO_NO_LO"), Expr("MO_NO_HI"))
        self._step("backward", node.name, Call("mo_add", args))

    def _in_place(self, node: Node, i: int, v: str, dy: str, last: bool) -> None:
        """An elementwise gradient: over dy where nothing else needs dy."""
        size = self.graph.values[v].bytes
        if v not in self.grad:
            alone = not self.pending[dy]
            dx = dy if alone else self._buffer(f"d:{v}", size, "gradient", value=v)
            self._dx_step(node, i, dy, dx, accumulate=False)
            self._own(v, dx)
            return
        part = self._buffer(f"d:{v}", size, "gradient", value=v)
        self._dx_step(node, i, dy, part, accumulate=False)
        self._add_to(node, v, part, "" if last else dy)

    def _computed(self, node: Node, i: int, v: str, dy: str, last: bool) -> None:
        """A gradient with a buffer of its own, or added to what v has."""
        size = self.graph.values[v].bytes
        if v not in self.grad:
            dx = self._buffer(f"d:{v}", size, "gradient", value=v)
            self._dx_step(node, i, dy, dx, accumulate=False)
            self._own(v, dx)
        elif OPS[node.op].accumulates:
            self._dx_step(node, i, dy, self._writable(node, v, dy), accumulate=True)
        else:
            part = self._buffer(f"d:{v}", size, "gradient", value=v)
            self._dx_step(node, i, dy, part, accumulate=False)
            self._add_to(node, v, part, "" if last else dy)

    def _dx_step(self, node: Node, i: int, dy: str, dx: str, accumulate: bool) -> None:
        operands = self._operands("backward", node)
        args = replace(self._backward_args(node, dy, operands), dx=dx, accumulate=accumulate)
        self._step("backward", node.name, OPS[node.op].c_dx(args, i))

    def _backward_args(
        self, node: Node, dy: str, operands: Mapping[str, Arg] | None = None
    ) -> BackwardArgs:
        return BackwardArgs(
            node,
            self.graph,
            tuple(self.where.get(x, "") for x in node.inputs),
            self.where[node.name],
            self._whole_operands(node) if operands is None else operands,
            dy=dy,
            kept=self._kept_buffers(node),
            wanted=self.wanted[node.name],
        )

    def _own(self, v: str, buffer: str) -> None:
        self.grad[v] = buffer
        self.pending.setdefault(buffer, set()).add(v)

    def _writable(self, node: Node, v: str, dy: str = "") -> str:
        """v's gradient in a buffer that no other value shares, and that is not `dy`."""
        mine = self.grad[v]
        if self.pending[mine] == {v} and mine != dy:
            return mine
        n = self.graph.values[v].size
        copy = self._buffer(f"d:{v}", 4 * n, "gradient", value=v)
        args = (Buf(copy, "w"), n, Buf(mine), n, 1, n, 0)
        self._step("backward", node.name, Call("mo_copy_blocks", args))
        self.pending[mine].discard(v)
        self._own(v, copy)
        return copy

    def _add_to(self, node: Node, v: str, part: str, dy: str) -> None:
        """Add `part` to v's gradient, which may not be written where it lies in `dy`."""
        mine = self._writable(node, v, dy)
        n = self.graph.values[v].size
        args = (Buf(mine, "rw"), Buf(mine), Buf(part), n, Expr("MO_NO_LO"), Expr("MO_NO_HI"))
        self._step("backward", node.name, Call("mo_add", args))

    def _kept_buffers(self, node: Node) -> tuple[str, ...]:
        return tuple(
            self.where[k.value] if k.kind == "value" else saved_name(k, node)
            for k in self.kept[node.name]
        )

    # ---- parameter gradients ----

    def _gradient(
        self, node: Node, role: str, dy: str, update: bool = True, finish: str = ""
    ) -> str:
        """Compute one parameter's gradient, and unless told otherwise update it at once.

        Returns the gradient's buffer.  Updated at once, the gradient is computed and applied in
        blocks of rows, so it needs only a block's room.  `finish` is the buffer of the scale's
        gradient where the weight's has to be finished first.
        """
        op = OPS[node.op]
        trained = self.trained[node.params[role]]
        s = self.wanted[node.name].params[role]
        accumulate = self.accumulate > 1
        alone = role == "weight" and op.slices_rows(self.graph, node, self.wanted[node.name])
        if s.out is not None and not alone:
            rows, _ = channels_last(self.graph.shape(node.name))
            part = self._buffer(f"rows:{node.name}", 4 * rows * len(s.out), "workspace")
            self._gather("backward", node, part, dy, s.out, self.graph.shape(node.name))
            dy = part
        name = f"g:{trained.param}"
        target = Buf(name, "rw" if accumulate else "w")
        args = self._backward_args(node, dy)
        floats = op.workspace(self.graph, node, args.wanted) if role == "weight" else 0
        if floats:
            space = self._buffer(f"parts:{node.name}", 4 * floats, "workspace")
            args = replace(args, space=space)
        grad = op.c_grad(args, role, s, target, accumulate)
        if accumulate:
            self._step("backward", node.name, *grad.calls, rows=grad.rows, block=grad.rows)
            if update:
                self._update(node, role, name)
            return name
        turned = bool(standardised(node)) and trained.layout == "hwc"
        block = grad.rows if turned or not update else _block(grad.rows, grad.row_elems)
        real = self._buffer(name, 4 * block * grad.row_elems, "gradient", value=trained.param)
        calls = tuple(_renamed(c, name, real) for c in grad.calls)
        if finish:
            looped = grad.rows > block
            calls = (*calls, self._finish(node, dy, real, trained.buffer, finish, looped))
        if update:
            standard = self._through_standardisation(node, role, real, looped=grad.rows > block)
            optimizer = self._optimizer_call(trained, real, grad.rows, grad.row_elems)
            calls = (*calls, *standard, optimizer)
            self._step("update", node.name, *calls, rows=grad.rows, block=block)
        else:
            self._step("backward", node.name, *calls, rows=grad.rows, block=block)
        return real

    def _whole_operands(self, node: Node) -> dict[str, Arg]:
        """The parameters that need no putting together: frozen, or trained whole."""
        operands: dict[str, Arg] = {}
        for role, name in node.params.items():
            trained = self.trained.get(name)
            if trained is None:
                operands[role] = Const(name, OPS[node.op].layout(self.graph, node, role))
            elif trained.slice.whole:
                operands[role] = Buf(trained.buffer)
        return operands

    def _update(self, node: Node, role: str, grad: str, before: tuple[Call, ...] = ()) -> None:
        trained = self.trained[node.params[role]]
        standard = self._through_standardisation(node, role, grad, looped=False)
        calls = [*before, *standard, self._optimizer_call(trained, grad, 1, trained.size)]
        if self.accumulate > 1:
            calls.append(Call("memset", (Buf(grad, "w"), 0, 4 * trained.size)))
        self._step("update", node.name, *calls, rows=1, block=1)

    def _optimizer_call(self, t: Trained, grad: str, rows: int, row_elems: int) -> Call:
        step = 0 if rows == 1 else row_elems
        n: Arg = row_elems if rows == 1 else Expr(f"(row_end - row) * {row_elems}")
        w = Buf(t.buffer, "rw", rows=step)
        states = [Buf(f"{s}:{t.param}", "rw", rows=step) for s in self.optimizer.states]
        lr, o = self._learning_rate(t), self.optimizer
        if isinstance(o, Adam) and len(self.patterns) > 1:
            done = tuple(running(int(rate != 0) for rate in t.rates))
            updates = Expr("{table}[inner] + beyond", ByStep("uint32_t", done))
            counted = (*o.betas, o.eps, updates, o.weight_decay)
            return Call("mo_adam_counted", (w, Buf(grad), *states, n, lr, *counted))
        if isinstance(o, Adam):
            more: tuple[Arg, ...] = (*o.betas, o.eps, Expr("c1"), Expr("c2"), o.weight_decay)
            return Call("mo_adam", (w, Buf(grad), *states, n, lr, *more))
        if o.momentum:
            return Call("mo_momentum", (w, Buf(grad), *states, n, lr, o.momentum, o.weight_decay))
        return Call("mo_sgd", (w, Buf(grad), n, lr, o.weight_decay))

    def _learning_rate(self, t: Trained) -> Expr:
        rates = {t.rate(k) for k in self.inner}
        if len(rates) > 1:
            return Expr("{table}[inner] * lr", ByStep("float", t.rates))
        (rate,) = rates
        return Expr("lr") if rate == 1.0 else Expr(f"{rate!r}f * lr")


def _block(rows: int, row_elems: int) -> int:
    """Rows per block: as many as fit BLOCK_BYTES, in multiples of the kernel's tile."""
    fit = BLOCK_BYTES // (4 * row_elems)
    return min(rows, max(MIN_ROWS, fit // MIN_ROWS * MIN_ROWS))


def _renamed(call: Call, old: str, new: str) -> Call:
    args = (replace(a, name=new) if isinstance(a, Buf) and a.name == old else a for a in call.args)
    return replace(call, args=tuple(args))


def _number(attr: object) -> float | None:
    return float(attr) if isinstance(attr, int | float) else None


__all__ = [
    "Buffer",
    "Loss",
    "Order",
    "Program",
    "Step",
    "Trained",
    "choose_saved",
    "lower",
    "lower_inference",
    "prepare",
    "saved_key",
    "wanted_gradients",
]
