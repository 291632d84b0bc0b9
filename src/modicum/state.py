"""Weights as numpy arrays: derived constants, slices, and the layouts that the C kernels use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput
from modicum.graph import Derived, Graph
from modicum.ops.base import Layout
from modicum.selection import Slice

Array = NDArray[np.float32]
State = Mapping[str, Array]


def materialise(graph: Graph, state: State) -> dict[str, Array]:
    """The values of all parameters of a prepared graph, derived ones computed.

    Raises InvalidInput for an entry that is missing, misshapen or not finite.
    """
    graph.check_params({k: tuple(v.shape) for k, v in state.items()}, "the state dict")
    values: dict[str, Array] = {}
    for param in graph.params.values():
        if param.derived is None:
            value = np.asarray(state[param.name], dtype=np.float32)
        else:
            missing = [s for s in param.derived.sources.values() if s not in state]
            if missing:
                raise InvalidInput(f"the state dict has no {missing[0]!r}", where=param.name)
            with np.errstate(all="ignore"):  # what comes out is checked below
                value = _derive(param.derived, param.shape, state)
        if not np.isfinite(value).all():
            raise InvalidInput(f"parameter {param.name!r} has values that are not finite")
        values[param.name] = value
    return values


def _derive(d: Derived, shape: tuple[int, ...], state: State) -> Array:
    """In double precision, rounded once."""
    get = {role: np.asarray(state[name], dtype=np.float64) for role, name in d.sources.items()}
    if d.kind == "full":
        return np.full(shape, d.fill, dtype=np.float32)
    if d.kind == "standardise":
        w = get["weight"]
        axes = tuple(range(1, w.ndim))
        standard = (w - w.mean(axes, keepdims=True)) / np.sqrt(w.var(axes, keepdims=True) + d.eps)
        return np.asarray(standard, dtype=np.float32)
    rstd = 1.0 / np.sqrt(get["bn_var"] + d.eps)
    if d.kind == "rstd":
        return rstd.astype(np.float32)
    scale = rstd * get.get("bn_weight", np.float64(1.0))
    if d.kind == "fold_weight":
        w = get["weight"]
        return (w * scale.reshape(-1, *[1] * (w.ndim - 1))).astype(np.float32)
    shift = get.get("bias", np.float64(0.0)) - get["bn_mean"]
    return (get.get("bn_bias", np.float64(0.0)) + shift * scale).astype(np.float32)


def cut(full: Array, s: Slice) -> Array:
    """The slice of a parameter, in PyTorch's layout."""
    part = full if s.out is None else full[list(s.out)]
    return part if s.inp is None else part[:, list(s.inp)]


def to_c(value: Array, layout: Layout) -> Array:
    """From PyTorch's layout to the kernels': [o][h][w][i], depthwise [h][w][c]."""
    if layout == "ohwi":
        value = value.transpose(0, 2, 3, 1)
    elif layout == "hwc":
        value = value[:, 0].transpose(1, 2, 0)
    return np.ascontiguousarray(value)


def from_c(flat: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """The inverse of `to_c`: `shape` is PyTorch's."""
    if layout == "ohwi":
        o, i, h, w = shape
        return np.ascontiguousarray(flat.reshape(o, h, w, i).transpose(0, 3, 1, 2))
    if layout == "hwc":
        c, _, h, w = shape
        return np.ascontiguousarray(flat.reshape(h, w, c).transpose(2, 0, 1)[:, None])
    return flat.reshape(shape).copy()


def image_to_c(x: Array) -> Array:
    """A batch of inputs (n, c, h, w) as the C side reads them, (n, h, w, c); others unchanged."""
    x = np.asarray(x, dtype=np.float32)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
