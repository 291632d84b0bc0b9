"""nn.Module + example -> Graph, through torch.export.  The only file that knows ATen."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from modicum.errors import InvalidInput, UnsupportedOperator, UsageError
from modicum.graph import Graph, Node, Param, Shape, Value
from modicum.ops import OPS
from modicum.ops.attention import SIDES, roles_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def capture(model: nn.Module, example: torch.Tensor) -> Graph:
    """Capture the forward pass of `model` (in eval mode) for one sample.

    `example` is one input or a batch of them, shape (n, ...); only the first is used.  The model
    is left as it was.  Raises UnsupportedOperator naming every operator that modicum does not
    have, with the modules they come from, and UsageError when the model does not run.

    >>> import torch
    >>> graph = capture(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    >>> print(graph.nodes[0].op)
    linear
    """
    import torch

    if not isinstance(example, torch.Tensor) or example.dim() == 0 or not len(example):
        raise UsageError("the example is not a tensor of at least one sample")
    exported = _export(model, example[:1])
    return _Reader(exported).graph()


def check_model(graph: Graph, model: nn.Module) -> None:
    """Raise InvalidInput unless `model` is the one that `graph` was captured from."""
    import torch

    state = {name: tuple(value.shape) for name, value in state_of(model).items()}
    graph.check_params(state, "the model")
    device = next(model.parameters()).device
    example = torch.zeros(graph.shape(graph.input), device=device)
    if capture(model, example).hash != graph.hash:
        raise InvalidInput(
            "the plan was made for another model",
            why="the captured graphs differ although the parameters have the same shapes",
            hint="make the plan again for this model",
        )


def _export(model: nn.Module, example: torch.Tensor) -> Any:
    import torch

    training = {m: m.training for m in model.modules()}
    model.eval()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch.export logs and prints before it raises
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,))
            if all(_target(fx) in READERS for fx in _calls(program)):
                return program
            # without a table this only makes in-place operators functional, and takes as long again
            return program.run_decompositions({})
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the model cannot be captured with an input of shape {tuple(example.shape)}",
            why=first,
            hint="call the model on the example yourself; torch.export has to be able to trace it",
        ) from error
    finally:
        logging.disable(level)
        for module, mode in training.items():
            module.training = mode


def _calls(program: Any) -> list[Any]:
    return [fx for fx in program.graph.nodes if fx.op == "call_function"]


def _target(fx: Any) -> str:
    """The operator that is called, as "conv2d" of aten.conv2d.default."""
    return str(getattr(fx.target, "__name__", fx.target)).split(".")[0]


class _Unsupported(Exception):
    """A node that cannot be read; collected, so that all are listed at once."""


class _Reader:
    """Reads one exported program; used once."""

    def __init__(self, exported: Any) -> None:
        self.exported = exported
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.params: dict[str, Param] = {}
        self.alias: dict[str, str] = {}  # fx name -> value name
        self.pads: dict[str, tuple[str, tuple[int, int, int, int]]] = {}
        self.standardised: dict[str, tuple[Any, float]] = {}  # fx name -> weight, eps
        self.attended: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # roles, attributes
        self.state_names: dict[str, str] = {}  # fx placeholder -> state dict key
        self.problems: list[str] = []

    def graph(self) -> Graph:
        import torch

        signature = self.exported.graph_signature
        self.state_names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **getattr(signature, "inputs_to_lifted_tensor_constants", {}),
        }
        self.trainable = set(signature.inputs_to_parameters.values())
        inputs = [n for n in signature.user_inputs if isinstance(n, str)]
        if not self.exported.call_spec.out_spec.is_leaf():
            raise UsageError(
                "the model's output is not one tensor",
                hint="a module around it that returns the one tensor that the loss is of",
            )
        if len(inputs) != 1 or len(signature.user_outputs) != 1:
            raise UsageError(
                f"the model has {len(inputs)} inputs and {len(signature.user_outputs)} outputs",
                hint="modicum trains models with one input tensor and one output tensor",
            )
        for fx in self.exported.graph.nodes:
            if fx.op == "placeholder" and fx.name == inputs[0]:
                if fx.meta["val"].dtype != torch.float32:
                    raise UsageError(f"the input is {fx.meta['val'].dtype}, modicum needs float32")
                self.values["input"] = Value(name="input", shape=tuple(fx.meta["val"].shape))
                self.alias[fx.name] = "input"
            elif fx.op == "call_function":
                self._read(fx)
        if self.problems:
            raise UnsupportedOperator(
                f"{len(self.problems)} operators of the model are not supported",
                where=self.problems,
                hint="replace them, or see `modicum ops` for the operators that there are",
            )
        return self._pruned(self.alias[signature.user_outputs[0]])

    def _read(self, fx: Any) -> None:
        reader = READERS.get(_target(fx))
        try:
            if reader is None:
                raise _Unsupported("not supported")
            reader(self, fx)
        except _Unsupported as problem:
            text = f"{_module(fx) or '(model)'}: {getattr(fx.target, '__name__', fx.target)}"
            self.problems.append(f"{text} ({problem})" if str(problem) else text)
            # go on with a stand-in, so that all problems are found in one run
            name = self._name(fx)
            val = fx.meta.get("val")
            shape = tuple(val.shape) if hasattr(val, "shape") else (1,)
            self.values[name] = Value(name=name, shape=tuple(max(1, int(d)) for d in shape))
            self.alias[fx.name] = name

    # ---- helpers for the readers ----

    def value(self, fx: Any) -> str:
        """The name of the value behind an argument that is a tensor."""
        fx_name = getattr(fx, "name", "")
        name = self.alias.get(fx_name)
        if name is None:
            why = "a constant operand"
            if fx_name in self.pads:
                why = "padding that is not followed by a convolution"
            elif fx_name in self.state_names:
                why = "a parameter as an operand"
            elif fx_name in self.standardised:
                why = "a layer norm of a parameter that is not a convolution's weight"
            raise _Unsupported(why)
        return name

    def branches(self, fx: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The roles and attributes of the attention of the layer that is passed this."""
        return self.attended.get(getattr(fx, "name", ""), ({}, {}))

    def shape(self, fx: Any) -> Shape:
        return self.values[self.value(fx)].shape

    def add(
        self,
        fx: Any,
        op: str,
        inputs: list[str],
        params: dict[str, Any] | None = None,
        name: str | None = None,
        **attrs: Any,
    ) -> str:
        """Append a node.  Parameters are fx placeholders; None is left out."""
        roles = {r: self._param(p) for r, p in (params or {}).items() if p is not None}
        node = Node(
            name=name or self._name(fx),
            op=op,
            inputs=tuple(inputs),
            params=roles,
            attrs=attrs,
            module=_module(fx),
        )
        try:
            shape = OPS[op].shape(node, [self.values[x].shape for x in inputs], self.params)
        except (ValueError, IndexError) as problem:
            raise _Unsupported(str(problem)) from None
        self.nodes.append(node)
        self.values[node.name] = Value(name=node.name, shape=shape)
        self.alias[fx.name] = node.name
        return node.name

    def _param(self, fx: Any) -> str:
        key = self.state_names.get(getattr(fx, "name", ""))
        if key is None:
            raise _Unsupported("its weights are computed, not stored")
        val = fx.meta["val"]
        trainable = key in self.trainable
        self.params[key] = Param(name=key, shape=tuple(val.shape), trainable=trainable)
        return key

    def _name(self, fx: Any) -> str:
        """The module's path where a module is one operator, otherwise with the fx name."""
        module = _module(fx)
        kind = fx.name.rstrip("0123456789").rstrip("_")
        name = module if module and module not in self.values else fx.name
        if name in self.values:
            name = f"{module}.{kind}"
        while name in self.values:
            name += "'"
        return name

    def _pruned(self, output: str) -> Graph:
        """Without what the output does not need."""
        needed, nodes = {output}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
                nodes.append(node)
        nodes.reverse()
        params = {p for n in nodes for p in n.params.values()}
        return Graph(
            input="input",
            output=output,
            values={k: v for k, v in self.values.items() if k in needed or k == "input"},
            params={k: v for k, v in self.params.items() if k in params},
            nodes=tuple(nodes),
        )


# ---- one reader per ATen operator ------------------------------------------------------------

Reader = Callable[[_Reader, Any], None]


def _args(fx: Any, *names_and_defaults: tuple[str, Any]) -> list[Any]:
    """Positional and keyword arguments of a call, defaults filled in."""
    values = []
    for i, (name, default) in enumerate(names_and_defaults):
        values.append(fx.args[i] if i < len(fx.args) else fx.kwargs.get(name, default))
    return values


def _pair(v: Any) -> tuple[int, int]:
    if isinstance(v, int):
        return (v, v)
    v = list(v)
    return (int(v[0]), int(v[-1]))


def _conv2d(r: _Reader, fx: Any) -> None:
    x, weight, bias, stride, padding, dilation, groups = _args(
        fx, ("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0),
        ("dilation", 1), ("groups", 1),
    )  # fmt: skip
    kernel = tuple(weight.meta["val"].shape)[2:]
    weight, eps = r.standardised.get(getattr(weight, "name", ""), (weight, 0.0))
    branches, rho = r.branches(x)
    more: dict[str, Any] = {**rho, **({"standardise": eps} if eps else {})}
    dilation = _pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        pads = (top, left, total[0] - top, total[1] - left)
    elif padding == "valid":
        pads = (0, 0, 0, 0)
    else:
        ph, pw = _pair(padding)
        pads = (ph, pw, ph, pw)
    if getattr(x, "name", "") in r.pads:
        source, before = r.pads[x.name]
        pads = tuple(a + b for a, b in zip(pads, before, strict=True))
    else:
        source = r.value(x)
    r.add(
        fx,
        "conv2d",
        [source],
        {"weight": weight, "bias": bias, **branches},
        stride=_pair(stride),
        padding=pads,
        dilation=dilation,
        groups=int(groups),
        **more,
    )
    _freeze(r, branches)


def _convolution(r: _Reader, fx: Any) -> None:
    """aten.convolution, which some versions of PyTorch write instead of conv2d."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = fx.args
    if transposed or len(stride) != 2:
        raise _Unsupported("only 2-D convolutions that are not transposed")
    kernel = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
    _conv2d(r, _Renamed(fx, (x, weight, bias), kernel))


class _Renamed:
    """An fx node seen with other arguments."""

    def __init__(self, fx: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.meta, self.args, self.kwargs = fx.name, fx.meta, args, kwargs


def _pad(r: _Reader, fx: Any) -> None:
    x, pad, value = _args(fx, ("self", None), ("pad", ()), ("value", 0.0))
    if value or len(pad) not in (2, 4) or min(pad) < 0 or len(r.shape(x)) != 4:
        raise _Unsupported("only zero padding of height and width")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    r.pads[fx.name] = (r.value(x), (top, left, bottom, right))


def _general_pad(r: _Reader, fx: Any) -> None:
    if len(fx.args) > 2 and fx.args[2] != "constant":
        raise _Unsupported("only zero padding")
    _pad(r, _Renamed(fx, fx.args[:2], {"value": (fx.args[3] if len(fx.args) > 3 else 0) or 0}))


def _cosine(r: _Reader, fx: Any) -> None:
    x, prototypes, scale, bias = fx.args
    roles = {"prototypes": prototypes, "scale": scale, "bias": bias}
    r.add(fx, "cosine", [r.value(x)], roles)
    _freeze(r, roles)  # a pass over the support set renews the prototypes


def _freeze(r: _Reader, roles: Iterable[str]) -> None:
    """Parameters of the last node that no plan trains."""
    for role in roles:
        key = r.nodes[-1].params[role]
        r.params[key] = r.params[key].model_copy(update={"trainable": False})


def _attend(r: _Reader, fx: Any) -> None:
    """What a layer is passed that has attention: remembered for that layer."""
    x, fw, bw, rho = fx.args
    branches: dict[str, Any] = {}
    for side, tensors in zip(SIDES, (fw, bw), strict=True):
        if tensors:
            branches.update(zip(roles_of(side), tensors, strict=True))
    r.attended[fx.name] = (branches, {"rho": float(rho)})
    source = getattr(x, "name", "")
    if source in r.pads:
        r.pads[fx.name] = r.pads[source]
    else:
        r.alias[fx.name] = r.value(x)


def _linear(r: _Reader, fx: Any) -> None:
    x, weight, bias = _args(fx, ("input", None), ("weight", None), ("bias", None))
    branches, more = r.branches(x)
    r.add(fx, "linear", [r.value(x)], {"weight": weight, "bias": bias, **branches}, **more)
    _freeze(r, branches)


def _batch_norm(r: _Reader, fx: Any) -> None:
    if "native" in str(fx.target):
        x, weight, bias, mean, var, momentum, eps = fx.args
    else:
        x, weight, bias, mean, var, training, momentum, eps, *_ = fx.args
        if training:
            raise _Unsupported("batch statistics; put the model in eval mode")
    if mean is None:
        raise _Unsupported("a batch norm without running statistics")
    if len(r.shape(x)) not in (2, 4):
        raise _Unsupported("a batch norm over rank 3")
    params = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    r.add(fx, "batch_norm", [r.value(x)], params, eps=float(eps), momentum=float(momentum))


def _group_norm(r: _Reader, fx: Any) -> None:
    x, groups, weight, bias, eps = _args(
        fx, ("input", None), ("num_groups", 1), ("weight", None), ("bias", None), ("eps", 1e-5)
    )
    params = {"weight": weight, "bias": bias}
    r.add(fx, "group_norm", [r.value(x)], params, groups=int(groups), eps=float(eps))


def _layer_norm(r: _Reader, fx: Any) -> None:
    """Of a convolution's weight over all but its first dimension: a standardised weight."""
    x, over, weight, bias, eps = _args(
        fx, ("input", None), ("normalized_shape", ()), ("weight", None), ("bias", None),
        ("eps", 1e-5),
    )  # fmt: skip
    if getattr(x, "name", "") not in r.state_names:
        raise _Unsupported("only of a convolution's weight; images have group norms")
    shape = tuple(x.meta["val"].shape)
    if len(shape) != 4 or tuple(over) != shape[1:] or weight is not None or bias is not None:
        raise _Unsupported("of a weight only per output channel, without scale and shift")
    if not eps > 0:
        raise _Unsupported("of a weight only with an eps above 0")
    r.standardised[fx.name] = (x, float(eps))


def _getitem(r: _Reader, fx: Any) -> None:
    source, index = fx.args
    if index != 0:
        raise _Unsupported(f"output {index} of {source.name}")
    r.alias[fx.name] = r.value(source)


def _clamp(lo: float | None, hi: float | None) -> Reader:
    def read(r: _Reader, fx: Any) -> None:
        _add_clamp(r, fx, lo, hi)

    return read


def _hardtanh(r: _Reader, fx: Any) -> None:
    _, lo, hi = _args(fx, ("self", None), ("min_val", -1.0), ("max_val", 1.0))
    _add_clamp(r, fx, lo, hi)


def _aten_clamp(r: _Reader, fx: Any) -> None:
    _, lo, hi = _args(fx, ("self", None), ("min", None), ("max", None))
    _add_clamp(r, fx, lo, hi)


def _add_clamp(r: _Reader, fx: Any, lo: float | None, hi: float | None) -> None:
    low = None if lo is None or lo == -math.inf else float(lo)
    high = None if hi is None or hi == math.inf else float(hi)
    r.add(fx, "clamp", [r.value(fx.args[0])], lo=low, hi=high)


def _elementwise(op: str) -> Reader:
    def read(r: _Reader, fx: Any) -> None:
        r.add(fx, op, [r.value(fx.args[0])])

    return read


def _max_pool2d(r: _Reader, fx: Any) -> None:
    x, kernel, stride, pad, dilation, ceil = _args(
        fx, ("self", None), ("kernel_size", None), ("stride", None), ("padding", 0),
        ("dilation", 1), ("ceil_mode", False),
    )  # fmt: skip
    r.add(
        fx,
        "max_pool2d",
        [r.value(x)],
        kernel=_pair(kernel),
        stride=_pair(stride or kernel),
        pad=_pair(pad),
        dilation=_pair(dilation),
        ceil=bool(ceil),
    )


def _avg_pool2d(r: _Reader, fx: Any) -> None:
    x, kernel, stride, pad, ceil, include, divisor = _args(
        fx, ("self", None), ("kernel_size", None), ("stride", None), ("padding", 0),
        ("ceil_mode", False), ("count_include_pad", True), ("divisor_override", None),
    )  # fmt: skip
    r.add(
        fx,
        "avg_pool2d",
        [r.value(x)],
        kernel=_pair(kernel),
        stride=_pair(stride or kernel),
        pad=_pair(pad),
        ceil=bool(ceil),
        include_pad=bool(include),
        divisor=int(divisor or 0),
    )


def _adaptive_avg_pool2d(r: _Reader, fx: Any) -> None:
    x, size = fx.args[:2]
    sizes = [size, size] if isinstance(size, int) else list(size)
    given = [s if s is not None else n for s, n in zip(sizes, r.shape(x)[-2:], strict=True)]
    r.add(fx, "adaptive_avg_pool2d", [r.value(x)], size=(int(given[0]), int(given[1])))


def _mean(r: _Reader, fx: Any) -> None:
    x, dims, keep = _args(fx, ("self", None), ("dim", None), ("keepdim", False))
    shape = r.shape(x)
    axes = sorted(d % len(shape) for d in dims or ())
    if len(shape) != 4 or axes != [2, 3]:
        raise _Unsupported("only the mean over height and width")
    pooled = r._name(fx)
    r.add(fx, "adaptive_avg_pool2d", [r.value(x)], name=pooled, size=(1, 1))
    if not keep:
        r.add(fx, "reshape", [pooled], name=f"{pooled}.flat", shape=(1, shape[1]))


def _add(r: _Reader, fx: Any) -> None:
    if fx.kwargs.get("alpha", 1) != 1 or len(fx.args) != 2:
        raise _Unsupported("only a plain sum of two tensors")
    r.add(fx, "add", [r.value(fx.args[0]), r.value(fx.args[1])])


def _mul(r: _Reader, fx: Any) -> None:
    """A product; what is spread over the other's pixels comes first."""
    gate, x = (r.value(a) for a in fx.args[:2])
    if len(r.values[gate].shape) == 4 and math.prod(r.values[gate].shape[2:]) > 1:
        gate, x = x, gate
    r.add(fx, "mul", [gate, x])


def _resize(mode: str) -> Reader:
    def read(r: _Reader, fx: Any) -> None:
        """upsample_*.vec: (x, size | None, [align,] scale_factors | None)"""
        x, size, *more = fx.args
        align = bool(more[0]) if mode == "bilinear" else False
        factors = more[-1] if size is None else None
        scales = tuple(float(f) for f in factors) if factors else (0.0, 0.0)
        out = tuple(int(n) for n in fx.meta["val"].shape[2:])
        r.add(fx, "resize", [r.value(x)], size=out, mode=mode, align=align, scales=scales)

    return read


def _cat(r: _Reader, fx: Any) -> None:
    xs = [r.value(x) for x in fx.args[0]]
    dim = fx.args[1] if len(fx.args) > 1 else 0
    r.add(fx, "concat", xs, dim=int(dim) % len(r.values[xs[0]].shape))


def _reshape(r: _Reader, fx: Any) -> None:
    """view, reshape, flatten, squeeze, unsqueeze: whatever keeps the elements in order."""
    out = tuple(int(d) for d in fx.meta["val"].shape)
    x = r.value(fx.args[0])
    if out == r.values[x].shape:
        r.alias[fx.name] = x
    elif out[:1] != (1,) or math.prod(out) != math.prod(r.values[x].shape):
        raise _Unsupported("it mixes the batch dimension with others")
    else:
        r.add(fx, "reshape", [x], shape=out)


def _same(r: _Reader, fx: Any) -> None:
    r.alias[fx.name] = r.value(fx.args[0])


def _dropout(r: _Reader, fx: Any) -> None:
    if fx.args[2]:
        raise _Unsupported("it is random; `training=self.training` turns it off in eval mode")
    _same(r, fx)


READERS: dict[str, Reader] = {
    "conv2d": _conv2d,
    "convolution": _convolution,
    "constant_pad_nd": _pad,
    "pad": _general_pad,
    "linear": _linear,
    "cosine_logits": _cosine,
    "attend": _attend,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "getitem": _getitem,
    "relu": _clamp(0.0, None),
    "relu6": _clamp(0.0, 6.0),
    "hardtanh": _hardtanh,
    "clamp": _aten_clamp,
    "hardswish": _elementwise("hardswish"),
    "hardsigmoid": _elementwise("hardsigmoid"),
    "sigmoid": _elementwise("sigmoid"),
    "silu": _elementwise("silu"),
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "_adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean,
    "upsample_nearest2d": _resize("nearest"),
    "upsample_bilinear2d": _resize("bilinear"),
    "add": _add,
    "mul": _mul,
    "cat": _cat,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
    "clone": _same,
    "contiguous": _same,
    "dropout": _dropout,
    "alias": _same,
}


def _module(fx: Any) -> str:
    stack = fx.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path)


def state_of(model: nn.Module) -> dict[str, Any]:
    """The model's parameters and buffers as float32 numpy arrays, by name."""
    entries = {  # a shared tensor under each of its names, of which torch.export picks one
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        name: t.detach().cpu().float().numpy()
        for name, t in entries.items()
        if t.is_floating_point()
    }
