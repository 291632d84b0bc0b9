"""What a method wants to see before it selects: Fisher scores of a few samples, weights' norms."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.apply import Tuned
from modicum.data import Data, check_samples
from modicum.errors import Diverged, UsageError
from modicum.graph import Graph
from modicum.lower import fisher_of
from modicum.methods import Inspect, Observed, ObservingMethod
from modicum.methods.layers import layers
from modicum.optim import SGD
from modicum.plan import Plan, plan

TOGETHER = 64
"""Samples that pass through the network at once."""
KNOWN = 32
"""Inspections that are remembered: a comparison makes the same few for every task."""
_inspections: dict[tuple[str, tuple[str, ...]], Plan] = {}


def observe(
    model: nn.Module,
    graph: Graph,
    method: ObservingMethod,
    samples: Data | None = None,
    *,
    queries: Data | None = None,
) -> Observed:
    """Look at a model's weights, and at samples, as far as the method asks for them.

    `samples` are (inputs (n, ...), labels (n,)).  Of a model with a cosine head they are the
    support set: their means are the prototypes, through which no gradient goes, and the loss is
    the cross-entropy of `queries`, such as augmented samples; without queries, of the samples
    themselves.  Of other models it is the cross-entropy of the outputs.

    Delta_o = sum_n (sum_d a_nd g_nd)^2 / 2N with g the gradient of sample n's own loss (TinyTrain,
    ICML 2024, eq. 2), in one backward pass that stops at the first value that the method probes
    and keeps those values alone (`inspection` is that pass as a plan).  The model is left alone.
    Raises UsageError where samples are missing, also of a class; InvalidInput for samples, or a
    model, that do not belong to the graph, and Diverged, which is one, for scores that are not
    finite.
    """
    start = time.perf_counter()
    state: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    graph.check_params({name: tuple(t.shape) for name, t in state.items()}, "the model")
    weighed = layers(graph) if method.weighs else []
    weights = {x.weight: state[x.weight].detach() for x in weighed}
    norms = {name: (_norms(w, 0), _norms(w, 1)) for name, w in weights.items()}
    fisher: dict[str, tuple[float, ...]] = {}
    count = 0
    if probes := method.probes(graph):
        if samples is None:
            raise UsageError(
                f"{type(method).__name__} has to see samples",
                hint="observe(model, graph, method, (x, y)), or --samples FILE",
            )
        tuned = Tuned(model, inspection(graph, probes))
        support, asked = _tensors(graph, samples), _tensors(graph, queries or samples)
        if graph.by_name[graph.output].op == "cosine":
            tuned.refresh(*support)
        fisher, count = _scores(tuned, probes, asked), len(asked[0])
    seconds = time.perf_counter() - start
    return Observed(fisher=fisher, norms=norms, samples=count, seconds=seconds)


def inspection(graph: Graph, probes: tuple[str, ...]) -> Plan:
    """The pass that scores the channels of these values, as a plan: its memory and its work."""
    key = graph.hash, probes
    if key not in _inspections:
        if len(_inspections) >= KNOWN:
            _inspections.clear()
        _inspections[key] = plan(graph, None, Inspect(values=probes), SGD(lr=1.0))
    return _inspections[key]


def _scores(
    tuned: Tuned, probes: tuple[str, ...], samples: tuple[Tensor, Tensor]
) -> dict[str, tuple[float, ...]]:
    x, y = samples
    device = next(tuned.parameters()).device
    for i in range(0, len(x), TOGETHER):
        logits = tuned(x[i : i + TOGETHER].to(device))
        loss = F.cross_entropy(logits, y[i : i + TOGETHER].to(device), reduction="sum")
        loss.backward()
    scores = {v: tuned.trained[fisher_of(v)].grad / len(x) for v in probes}
    if not all(bool(torch.isfinite(s).all()) for s in scores.values()):
        raise Diverged(
            "the Fisher scores are not finite", why="activations or gradients are too large"
        )
    return {v: tuple(s.tolist()) for v, s in scores.items()}


def _norms(weight: Tensor, dim: int) -> tuple[float, ...]:
    rest = [d for d in range(weight.dim()) if d != dim]
    return tuple(weight.double().square().sum(rest).sqrt().tolist())


def _tensors(graph: Graph, samples: Data) -> tuple[Tensor, Tensor]:
    x, y = check_samples(graph, samples)
    return torch.from_numpy(x), torch.from_numpy(y)
