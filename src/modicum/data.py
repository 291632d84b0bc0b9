"""Samples from outside, checked before anything is done with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput
from modicum.graph import Graph
from modicum.lower import Loss
from modicum.plan import Plan

Data = tuple[Any, Any]


def check_data(plan: Plan, data: Data) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Inputs (n, ...) as float32 and labels (n,) as int64, or targets (n, outputs) for mse.

    Takes arrays or tensors.  Raises InvalidInput for what a plan cannot train on.
    """
    return check_samples(plan.graph, data, plan.loss)


def check_samples(
    graph: Graph, data: Data, loss: Loss = "cross_entropy"
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """`check_data` without a plan."""
    outputs = graph.values[graph.output].size
    x, y = check_inputs(graph, data[0]), _array(data[1])
    if y.ndim == 0 or len(x) != len(y):
        raise InvalidInput(f"{len(x)} inputs but labels of shape {y.shape}")
    return x, (_targets if loss == "mse" else _labels)(y, outputs)


def check_inputs(graph: Graph, inputs: Any) -> NDArray[np.float32]:
    """Inputs (n, ...) as float32; raises InvalidInput for such as the model does not take."""
    x = _array(inputs, np.float32)
    wanted = graph.shape(graph.input)[1:]
    if x.ndim and not len(x):
        raise InvalidInput("there are no samples")
    if not x.ndim or x.shape[1:] != wanted:
        raise InvalidInput(
            f"the inputs have shape {x.shape}",
            why=f"the model takes (n, {', '.join(map(str, wanted))})",
        )
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise InvalidInput(f"input {bad[0]} has values that are not finite ({len(bad)} inputs do)")
    return x


def _array(values: Any, dtype: Any = None) -> NDArray[Any]:
    try:
        return np.asarray(values, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InvalidInput("the samples are not arrays of numbers", why=str(error)) from None


def _targets(y: NDArray[Any], outputs: int) -> NDArray[np.float32]:
    if y.size != len(y) * outputs or y.dtype.kind not in "fiu" or not np.isfinite(y).all():
        raise InvalidInput(f"targets must be finite and of shape (n, {outputs})")
    return y.astype(np.float32).reshape(len(y), outputs)


def _labels(y: NDArray[Any], outputs: int) -> NDArray[np.int64]:
    wrong = f"labels must be whole numbers from 0 to {outputs - 1}"
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InvalidInput(wrong, why=f"they have shape {y.shape} and type {y.dtype}")
    if y.min() < 0 or y.max() >= outputs:
        raise InvalidInput(wrong, why=f"they range from {y.min()} to {y.max()}")
    return y.astype(np.int64)
