"""Graphs made by hand or by hypothesis, without torch."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from modicum.graph import Graph, Node, Param, Shape, Value
from modicum.methods import Explicit
from modicum.ops import OPS
from modicum.optim import SGD, Adam
from modicum.selection import Selection, Slice, Update


class Builder:
    """Appends nodes and works out their shapes, as capture does."""

    def __init__(self, *shape: int) -> None:
        self.values = {"input": Value(name="input", shape=(1, *shape))}
        self.params: dict[str, Param] = {}
        self.nodes: list[Node] = []

    def add(
        self,
        op: str,
        *inputs: str,
        params: dict[str, Shape] | None = None,
        name: str = "",
        **attrs: object,
    ) -> str:
        name = name or f"{op}{len(self.nodes)}"
        roles = {role: f"{name}.{role}" for role in params or {}}
        for role, shape in (params or {}).items():
            trainable = role in OPS[op].roles
            self.params[roles[role]] = Param(name=roles[role], shape=shape, trainable=trainable)
        node = Node(name=name, op=op, inputs=inputs, params=roles, attrs=attrs, module=name)
        shape = OPS[op].shape(node, [self.values[x].shape for x in inputs], self.params)
        if min(shape) < 1:
            raise ValueError(f"{op} has no output")
        self.nodes.append(node)
        self.values[name] = Value(name=name, shape=shape)
        return name

    def shape(self, name: str) -> Shape:
        return self.values[name].shape

    def conv(self, x: str, out: int, kernel: int = 3, groups: int = 1, **more: object) -> str:
        """A convolution of stride 1 with zeros all around it, unless `more` says otherwise."""
        bias, name = more.pop("bias", True), str(more.pop("name", ""))
        attrs = {"stride": (1, 1), "padding": (kernel // 2,) * 4, "dilation": (1, 1), **more}
        weight = (out, self.shape(x)[1] // groups, kernel, kernel)
        params = {"weight": weight, **({"bias": (out,)} if bias else {})}
        return self.add("conv2d", x, params=params, name=name, groups=groups, **attrs)

    def linear(self, x: str, out: int, bias: bool = True, name: str = "") -> str:
        params = {"weight": (out, self.shape(x)[-1]), **({"bias": (out,)} if bias else {})}
        return self.add("linear", x, params=params, name=name)

    def norm(self, x: str, affine: bool = True, name: str = "") -> str:
        roles = ("weight", "bias", "mean", "var") if affine else ("mean", "var")
        params = {role: (self.shape(x)[1],) for role in roles}
        return self.add("batch_norm", x, params=params, name=name, eps=1e-5, momentum=0.3)

    def relu(self, x: str, lo: float | None = 0.0, hi: float | None = None, name: str = "") -> str:
        return self.add("clamp", x, name=name, lo=lo, hi=hi)

    def flatten(self, x: str, name: str = "") -> str:
        size = self.values[x].size
        return self.add("reshape", x, name=name, shape=(1, size))

    def graph(self, output: str) -> Graph:
        """Without what the output does not need."""
        needed, nodes = {output, "input"}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
                nodes.insert(0, node)
        used = {p for n in nodes for p in n.params.values()}
        return Graph(
            input="input",
            output=output,
            values={k: v for k, v in self.values.items() if k in needed},
            params={k: v for k, v in self.params.items() if k in used},
            nodes=tuple(nodes),
        )


def small_cnn(classes: int = 4) -> Graph:
    """conv - norm - relu - depthwise - relu6 - pointwise + skip - pool - linear."""
    b = Builder(3, 8, 8)
    x = b.relu(b.norm(b.conv("input", 8, name="stem", bias=False), name="norm"), name="act")
    y = b.relu(b.conv(x, 8, groups=8, name="depthwise"), hi=6.0, name="act6")
    y = b.conv(y, 8, kernel=1, name="pointwise")
    y = b.add("add", x, y, name="skip")
    y = b.add("adaptive_avg_pool2d", y, name="pool", size=(1, 1))
    return b.graph(b.linear(b.flatten(y, name="flat"), classes, name="head"))


# ---- generated graphs ------------------------------------------------------------------------

small = st.integers(1, 3)
NORM_OVER = 3
"""Values that statistics are taken over, at least.  Two are normalised to -1 and 1, whatever they
are: the gradient by them is what eps leaves of a difference of equal terms, in float32 noise."""


@st.composite
def graphs(draw: st.DrawFn, most: int = 8) -> Graph:
    """A connected graph of up to `most` operators and a linear head of rank 2."""
    kind = draw(st.sampled_from(["image", "image", "image", "rows", "vector"]))
    shape = {
        "image": st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
        "rows": st.tuples(st.integers(1, 4), st.integers(1, 6)),
        "vector": st.tuples(st.integers(1, 9)),
    }[kind]
    b = Builder(*draw(shape))
    last = "input"
    for _ in range(draw(st.integers(1, most))):
        choices = IMAGE if len(b.shape(last)) == 4 else FLAT
        grow = draw(st.sampled_from(choices))
        # mostly go on from the last value, at times from an earlier one
        names = list(b.values)
        source = last if draw(st.integers(0, 3)) else draw(st.sampled_from(names))
        if (len(b.shape(source)) == 4) != (choices is IMAGE):
            source = last
        try:
            last = grow(draw, b, source)
        except ValueError:
            continue
        if b.values[last].size > 600:
            last = (
                b.flatten(b.add("adaptive_avg_pool2d", last, size=(1, 1)))
                if (len(b.shape(last)) == 4)
                else last
            )
    if len(b.shape(last)) != 2:
        last = b.flatten(last)
    return b.graph(b.linear(last, draw(st.integers(2, 5)), name="head"))


Grow = Callable[[st.DrawFn, Builder, str], str]


def _conv(draw: st.DrawFn, b: Builder, x: str) -> str:
    c = b.shape(x)[1]
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    out = groups * draw(st.integers(1, max(1, 9 // groups)))
    kh, kw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    params = {"weight": (out, c // groups, kh, kw)}
    if draw(st.booleans()):
        params["bias"] = (out,)
    more = {}
    if c // groups * kh * kw > 2 and not draw(st.integers(0, 2)):  # two entries become -1 and 1
        more["standardise"] = draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    return b.add(
        "conv2d",
        x,
        params=params,
        stride=(draw(small), draw(small)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(4)),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        **more,
    )


def _pointwise(draw: st.DrawFn, b: Builder, x: str) -> str:
    return b.conv(x, draw(st.integers(1, 10)), kernel=1, bias=draw(st.booleans()))


def _norm(draw: st.DrawFn, b: Builder, x: str) -> str:
    if len(b.shape(x)) == 3:
        raise ValueError("capture refuses it")
    return b.norm(x, affine=draw(st.booleans()))


def _conv_norm(draw: st.DrawFn, b: Builder, x: str) -> str:
    """A convolution and its norm, at times with an activation: two that lowering makes one of."""
    c = b.shape(x)[1]
    depthwise = c > 1 and draw(st.booleans())
    out, kernel = (c, 3) if depthwise else (draw(st.integers(1, 9)), draw(st.sampled_from([1, 3])))
    stride = (draw(st.integers(1, 2)), 1)
    groups = c if depthwise else 1
    y = b.conv(x, out, kernel, groups, stride=stride, bias=not draw(st.integers(0, 3)))
    y = b.norm(y, affine=bool(draw(st.integers(0, 3))))
    return draw(
        st.sampled_from(
            [lambda y: y, lambda y: _clamp(draw, b, y), lambda y: b.add("hardswish", y)]
        )
    )(y)


def _clamp(draw: st.DrawFn, b: Builder, x: str) -> str:
    lo, hi = draw(st.sampled_from([(0.0, None), (0.0, 6.0), (-1.0, 1.0), (0.0, 0.5)]))
    return b.relu(x, lo, hi)


def _activation(draw: st.DrawFn, b: Builder, x: str) -> str:
    return b.add(draw(st.sampled_from(["hardswish", "hardsigmoid", "sigmoid", "silu"])), x)


def _group_norm(draw: st.DrawFn, b: Builder, x: str) -> str:
    if len(b.shape(x)) == 3:
        raise ValueError("no channels to group")
    c = b.shape(x)[1]
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    if b.values[x].size // groups < NORM_OVER:
        raise ValueError("no gradient but rounding")
    params = {"weight": (c,), "bias": (c,)} if draw(st.booleans()) else {}
    return b.add("group_norm", x, params=params, groups=groups, eps=1e-5)


def _gate(draw: st.DrawFn, b: Builder, x: str) -> str:
    """Squeeze and excitation."""
    pooled = b.add("adaptive_avg_pool2d", x, size=(1, 1))
    squeezed = b.relu(b.conv(pooled, draw(st.integers(1, 4)), kernel=1))
    gate = b.conv(squeezed, b.shape(x)[1], kernel=1)
    return b.add("mul", b.add(draw(st.sampled_from(["hardsigmoid", "sigmoid"])), gate), x)


def _mul(draw: st.DrawFn, b: Builder, x: str) -> str:
    same = [n for n, v in b.values.items() if v.shape == b.shape(x)]
    return b.add("mul", draw(st.sampled_from(same)), x)


def _resize(draw: st.DrawFn, b: Builder, x: str) -> str:
    mode, align = draw(st.sampled_from([("nearest", 0), ("bilinear", 0), ("bilinear", 1)]))
    h, w = b.shape(x)[2:]
    if draw(st.booleans()):
        size, scales = (draw(st.integers(1, 8)), draw(st.integers(1, 8))), (0.0, 0.0)
    else:
        scales = tuple(draw(st.sampled_from([0.5, 1.5, 2.0, 2.3])) for _ in range(2))
        size = (int(h * scales[0]), int(w * scales[1]))
    return b.add("resize", x, size=size, mode=mode, align=bool(align), scales=scales)


def _window(draw: st.DrawFn) -> dict[str, object]:
    kernel = (draw(small), draw(small))
    return {
        "kernel": kernel,
        "stride": (draw(small), draw(small)),
        "pad": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil": draw(st.booleans()),
    }


def _max_pool(draw: st.DrawFn, b: Builder, x: str) -> str:
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    window = _window(draw)
    return b.add("max_pool2d", x, **window, dilation=dilation)


def _avg_pool(draw: st.DrawFn, b: Builder, x: str) -> str:
    divisor = draw(st.sampled_from([0, 0, 3]))
    return b.add("avg_pool2d", x, **_window(draw), include_pad=draw(st.booleans()), divisor=divisor)


def _adaptive(draw: st.DrawFn, b: Builder, x: str) -> str:
    return b.add("adaptive_avg_pool2d", x, size=(draw(small), draw(small)))


def _add(draw: st.DrawFn, b: Builder, x: str) -> str:
    same = [n for n, v in b.values.items() if v.shape == b.shape(x)]
    return b.add("add", x, draw(st.sampled_from(same)))


def _concat(draw: st.DrawFn, b: Builder, x: str) -> str:
    shape = b.shape(x)
    dim = draw(st.integers(1, len(shape) - 1))
    fits = [
        n
        for n, v in b.values.items()
        if len(v.shape) == len(shape)
        and all(v.shape[d] == shape[d] for d in range(len(shape)) if d != dim)
    ]
    return b.add(
        "concat", x, *draw(st.lists(st.sampled_from(fits), min_size=1, max_size=2)), dim=dim
    )


def _reshape(draw: st.DrawFn, b: Builder, x: str) -> str:
    n = b.values[x].size
    shapes = [(1, n)]
    for c in (2, 3, 4):
        if n % c == 0:
            shapes += [(1, c, n // c), (1, n // c, c)]
            shapes += [(1, c, n // c, 1)] if len(b.shape(x)) != 4 else []
    return b.add("reshape", x, shape=draw(st.sampled_from(shapes)))


def _linear(draw: st.DrawFn, b: Builder, x: str) -> str:
    return b.linear(x, draw(st.integers(1, 9)), bias=draw(st.booleans()))


IMAGE: list[Grow] = [
    _conv, _conv, _conv_norm, _conv_norm, _conv_norm, _pointwise, _norm, _norm, _clamp, _clamp,
    _max_pool, _avg_pool, _adaptive, _add, _add, _concat, _reshape, _activation, _activation,
    _group_norm, _gate, _mul, _resize,
]  # fmt: skip
FLAT: list[Grow] = [
    _linear, _linear, _norm, _clamp, _add, _add, _concat, _reshape, _activation, _group_norm, _mul,
]  # fmt: skip


def inverted_residual(
    b: Builder, x: str, name: str, out: int, norms: bool = True, **more: object
) -> str:
    """An inverted residual block; `gate`, `residual`, `stride`, `expansion`, `acts`."""
    c = b.shape(x)[1] * int(more.get("expansion", 3))
    stride = int(more.get("stride", 1))
    y = b.conv(x, c, 1, bias=not norms, name=f"{name}.expand")
    y = b.norm(y, name=f"{name}.n1") if norms else y
    y = b.add("hardswish", y, name=f"{name}.a1") if more.get("acts", True) else y
    y = b.conv(y, c, 3, c, stride=(stride, stride), bias=not norms, name=f"{name}.dw")
    y = b.norm(y, name=f"{name}.n2") if norms else y
    y = b.relu(y, 0.0, 6.0, name=f"{name}.a2") if more.get("acts", True) else y
    if more.get("gate"):
        g = b.add("adaptive_avg_pool2d", y, name=f"{name}.pool", size=(1, 1))
        g = b.relu(b.conv(g, 2, 1, name=f"{name}.reduce"), name=f"{name}.relu")
        g = b.add("hardsigmoid", b.conv(g, c, 1, name=f"{name}.grow"), name=f"{name}.gate")
        y = b.add("mul", g, y, name=f"{name}.scaled")
    y = b.conv(y, out, 1, bias=not norms, name=f"{name}.project")
    y = b.norm(y, name=f"{name}.n3") if norms else y
    return b.add("add", x, y, name=f"{name}.add") if more.get("residual") else y


def blocks_net(*blocks: dict[str, object]) -> Graph:
    """A stem, these blocks, a feature mix and a head."""
    b = Builder(3, 8, 8)
    x = b.relu(b.norm(b.conv("input", 4, name="stem"), name="stem.norm"), name="stem.act")
    for i, more in enumerate(blocks):
        x = inverted_residual(b, x, f"b{i}", 4, **more)
    x = b.relu(b.norm(b.conv(x, 6, 1, name="mix"), name="mix.norm"), name="mix.act")
    x = b.add("adaptive_avg_pool2d", x, name="mean", size=(1, 1))
    return b.graph(b.linear(b.flatten(x), 3, name="head"))


@st.composite
def selections(draw: st.DrawFn, graph: Graph, slices: bool = True, modes: bool = True) -> Selection:
    """Some of the trainable parameters, some in slices; batch statistics and sign masks."""
    names = graph.trainable()
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    if not draw(st.integers(0, 3)):
        chosen = names
    updates = []
    slices = slices and draw(st.booleans())
    for name in names:
        if name in chosen:
            part = draw(_slices(graph, name)) if slices else Slice()
            updates.append(Update(param=name, slice=part))
    norms, signs = [], []
    if modes:
        every = [n.name for n in graph.nodes if n.op == "batch_norm"]
        norms = [name for name in every if _pixels(graph, name) >= NORM_OVER]
        signs = [n.name for n in graph.nodes if OPS[n.op].takes_sign(n)]
    batch = {n for n in norms if not draw(st.integers(0, 2))}
    sign = {n for n in signs if draw(st.booleans())}
    return Selection(
        updates=tuple(updates),
        batch_norms=tuple(n for n in norms if n in batch),
        sign=tuple(n for n in signs if n in sign),
    )


def _pixels(graph: Graph, name: str) -> int:
    shape = graph.shape(name)
    return shape[2] * shape[3] if len(shape) == 4 else 1


def _slices(graph: Graph, name: str) -> st.SearchStrategy[Slice]:
    shape = graph.params[name].shape
    ((node, role),) = graph.users_of(name)
    if role == "weight" and node.attrs.get("standardise"):
        return st.just(Slice())
    inp = _channels(shape[1]) if len(shape) > 1 else st.none()
    return st.builds(Slice, out=_channels(shape[0]), inp=inp)


def _channels(n: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """None, or a few of them, or each or not."""
    few = st.sets(st.integers(0, n - 1), min_size=1, max_size=3).map(lambda s: tuple(sorted(s)))
    each = st.lists(st.booleans(), min_size=n, max_size=n).filter(any)
    return st.none() | few | each.map(lambda flags: tuple(i for i in range(n) if flags[i]))


@st.composite
def by_step(draw: st.DrawFn, selection: Selection, most: int = 4) -> Selection:
    """The selection with random step sizes for up to `most` inner steps, each of which updates."""
    steps, n = draw(st.integers(1, most)), len(selection.updates)
    table = [
        [draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])) for _ in range(steps)] for _ in range(n)
    ]
    for step in range(steps):
        if not any(row[step] for row in table):
            table[draw(st.integers(0, n - 1))][step] = 1.0
    updates = []
    for update, row in zip(selection.updates, table, strict=True):
        while len(row) > 1 and row[-1] == row[-2] and draw(st.booleans()):
            row.pop()
        if any(row):
            updates.append(update.model_copy(update={"rates": tuple(row)}))
    return selection.model_copy(update={"updates": tuple(updates)})


optimizers = st.sampled_from(
    [
        SGD(lr=0.05),
        SGD(lr=0.05, weight_decay=0.01),
        SGD(lr=0.05, momentum=0.9, weight_decay=0.01),
        Adam(lr=0.01),
        Adam(lr=0.01, betas=(0.8, 0.95), weight_decay=0.01),
    ]
)


@st.composite
def jobs(draw: st.DrawFn, most: int = 8) -> dict[str, object]:
    """The arguments of `lower`."""
    graph = draw(graphs(most))
    return {
        "graph": graph,
        "selection": draw(selections(graph)),
        "optimizer": draw(optimizers),
        "loss": draw(st.sampled_from(["cross_entropy", "mse"])),
        "accumulate": draw(st.sampled_from([1, 1, 3])),
    }


@st.composite
def sliced(draw: st.DrawFn) -> dict[str, object]:
    """A job whose middle operator is trained in slices: a grouped convolution, or a norm whose
    statistics are those of its input.  The layer before it is trained or not."""
    kind = draw(st.sampled_from(["conv", "conv", "batch_norm", "group_norm"]))
    groups, each = draw(st.sampled_from([1, 2, 3, 4, 5])), draw(st.sampled_from([1, 2, 3, 4]))
    b = Builder(2, draw(st.integers(1, 7)), draw(st.integers(3, 7)))
    x = b.conv("input", groups * each, kernel=1, name="below")
    if kind == "conv":
        out, kh, kw = draw(st.sampled_from([1, 2, 3, 4])), draw(small), draw(small)
        y = b.add(
            "conv2d",
            x,
            params={"weight": (groups * out, each, kh, kw), "bias": (groups * out,)},
            name="op",
            stride=(draw(small), draw(small)),
            padding=tuple(draw(st.integers(1, 2)) for _ in range(4)),
            dilation=(1, draw(st.integers(1, 2))),
            groups=groups,
        )
    elif kind == "batch_norm":
        y = b.norm(x, name="op")
    else:
        params = {"weight": (groups * each,), "bias": (groups * each,)}
        y = b.add("group_norm", x, params=params, name="op", groups=groups, eps=1e-3)
    graph = b.graph(b.linear(b.flatten(b.add("hardswish", y)), 3, name="head"))
    updates = [Update(param="op.weight", slice=draw(_slices(graph, "op.weight")))]
    if draw(st.booleans()):
        updates.append(Update(param="op.bias", slice=draw(_slices(graph, "op.bias"))))
    if draw(st.booleans()):
        updates.insert(0, Update(param=draw(st.sampled_from(["below.weight", "below.bias"]))))
    norms = ("op",) if kind == "batch_norm" else ()
    return {
        "graph": graph,
        "selection": Selection(updates=tuple(updates), batch_norms=norms),
        "optimizer": SGD(lr=0.05),
        "loss": draw(st.sampled_from(["cross_entropy", "mse"])),
        "accumulate": draw(st.sampled_from([1, 3])),
    }


def explicit(selection: Selection) -> Explicit:
    """The method that selects exactly this."""
    return Explicit(
        params={
            u.param: {"out": u.slice.out, "inp": u.slice.inp, "rates": u.rates}  # type: ignore[dict-item]
            for u in selection.updates
        },
        batch_norms=selection.batch_norms,
        sign=selection.sign,
    )


def renamed(selection: Selection, graph: Graph, captured: Graph) -> Selection:
    """The selection with the names that capture gives to the same norms and activations."""
    ops = ("batch_norm", "clamp", "hardswish", "silu")
    there, here = ([n.name for n in g.nodes if n.op in ops] for g in (captured, graph))
    names = dict(zip(here, there, strict=True))
    norms, sign = (tuple(names[n] for n in x) for x in (selection.batch_norms, selection.sign))
    return selection.model_copy(update={"batch_norms": norms, "sign": sign})
