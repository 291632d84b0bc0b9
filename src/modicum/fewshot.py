"""Learn a few-shot task under a plan: pseudo-queries against prototypes, then predict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from modicum.adapt import accuracy, predict, progress_bar, torch_optimizer, update
from modicum.apply import Tuned, apply
from modicum.data import Data, check_data, check_inputs, check_samples
from modicum.errors import Diverged, UsageError
from modicum.graph import Graph
from modicum.heads import FewShot, class_means, cosine
from modicum.methods import Observed, ObservingMethod
from modicum.observe import observe
from modicum.plan import Plan
from modicum.tasks import PseudoQuery, pseudo_query
from modicum.trace import Trace

Array = NDArray[Any]
Rate = Annotated[float, Field(ge=0, lt=float("inf"))]
OBSERVED = 1_000_000
"""The step whose pseudo-queries a method scores its channels on: none of those it learns from."""
TOGETHER = 64
"""Images of which a refresh takes the embeddings at once."""


class FineTune(PseudoQuery):
    """How a task is learned: Hu et al. (CVPR 2022), as TinyTrain does with every method.

    In each of `iterations` steps the support images are changed (`probability`, `colour`,
    `translate`: see PseudoQuery) and classified as queries against the prototypes of the
    unchanged ones; the loss is the cross-entropy.  `prototypes`: "moving" computes them in each
    step and passes gradient through them, as the papers do; "refreshed" computes them in each
    step by a pass without gradient, as the emitted C can; "fixed" leaves them as they are at the
    start.  `entropy` weights the mean entropy of the predictions for the task's own queries
    (transductive fine-tuning, Dhillon et al., ICLR 2020).
    """

    iterations: Annotated[int, Field(ge=0)] = 40
    prototypes: Literal["moving", "refreshed", "fixed"] = "moving"
    entropy: Rate = 0.0


@dataclass
class Learned:
    """What came of a task: the loss of each iteration, and seconds of the whole loop."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fine_tune(
    model: nn.Module,
    plan: Plan,
    support: tuple[Array, Array],
    config: FineTune | None = None,
    *,
    seed: int = 0,
    queries: Array | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Tuned, Learned]:
    """Learn a task from its support set (n, ...), (n,), and return the model with what it cost.

    Each iteration is an inner step of the plan.  `plan` is of a `few_shot` model with as many ways
    as the task; a model with a linear head learns the pseudo-queries themselves.  `queries` are the
    task's unlabelled queries, for `entropy`.  `model` is left alone.  Raises Diverged, UsageError
    for a class without a support sample, and InvalidInput for images or labels that do not belong
    to the plan's graph.
    """
    config = config or FineTune()
    start = time.perf_counter()
    tuned = Tuned(model, plan)  # as `apply`, which would capture the model again
    task = _Learner(tuned, config, seed, support, queries)
    learned = Learned()
    optimizer = torch_optimizer(plan.optimizer, tuned, plan)
    for step in range(config.iterations):
        loss = task.loss(step)
        learned.losses.append(float(loss.detach()))
        if not np.isfinite(learned.losses[-1]):
            raise Diverged(f"the loss is not finite in step {step}", hint="a smaller learning rate")
        loss.backward()
        update(optimizer, tuned)
        if on_step is not None:
            on_step(step, learned.losses[-1])
    task.finish()
    learned.seconds = time.perf_counter() - start
    return tuned, learned


def learn_task(
    model: nn.Module,
    plan: Plan,
    support: Data,
    config: FineTune | None = None,
    *,
    test: Data | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Trace:
    """`fine_tune` as a Trace; `model` is left alone.

    Its losses are those of the iterations, `accuracy_before` that of the support set's prototypes
    without training, and its state has the prototypes.  `test` are queries to be judged on, which
    `entropy` looks at too, without their labels.  Raises as `fine_tune`, and InvalidInput for data
    that does not fit the plan.
    """
    config = config or FineTune()
    x, y = check_data(plan, support)
    held = None if test is None else check_data(plan, test)
    trace = Trace("torch", plan.hash, seed)
    start = apply(model, plan)
    if held is not None:
        if start.head() is not None:
            start.refresh(torch.from_numpy(x), torch.from_numpy(y))
        trace.logits_before = predict(start, torch.from_numpy(held[0]))
        trace.accuracy_before = accuracy(plan, trace.logits_before, held[1])
    with progress_bar(progress, config.iterations) as advance:
        tuned, learned = fine_tune(
            model,
            plan,
            (x, y),
            config,
            seed=seed,
            queries=None if held is None else held[0],
            on_step=lambda step, loss: advance(),
        )
    if held is not None:
        trace.logits_after = predict(tuned, torch.from_numpy(held[0]))
        trace.accuracy_after = accuracy(plan, trace.logits_after, held[1])
    trace.losses = learned.losses
    trace.figures["seconds"] = learned.seconds
    trace.state = {name: t.cpu().numpy() for name, t in tuned.learned().items()}
    return trace


def observe_task(
    model: nn.Module,
    graph: Graph,
    method: ObservingMethod,
    support: Data,
    config: PseudoQuery | None = None,
    *,
    seed: int = 0,
) -> Observed:
    """`observe` a support set (n, ...), (n,) as `fine_tune` with this config and seed learns it.

    With a cosine head the channels are scored on pseudo-queries, with another on the samples.
    """
    if not method.probes(graph) or graph.by_name[graph.output].op != "cosine":
        return observe(model, graph, method, support)
    x = np.asarray(support[0], np.float32)
    asked = pseudo_query(x, config or PseudoQuery(), seed=seed, step=OBSERVED)
    return observe(model, graph, method, support, queries=(asked, support[1]))


def refresh(net: FewShot, support: tuple[Array, Array]) -> None:
    """Set the prototypes of a net to the class means of a support set (n, ...), (n,)."""
    device = next(net.parameters()).device
    x = torch.from_numpy(np.asarray(support[0], np.float32))
    with torch.no_grad():
        parts = [net.backbone(x[i : i + TOGETHER].to(device)) for i in range(0, len(x), TOGETHER)]
    labels = torch.as_tensor(np.asarray(support[1])).long()
    net.head.refresh(torch.cat(parts), labels.to(device))


class _Learner:
    """The losses of one task, step by step; used once."""

    def __init__(
        self,
        tuned: Tuned,
        config: FineTune,
        seed: int,
        support: tuple[Array, Array],
        queries: Array | None,
    ) -> None:
        self.tuned, self.config, self.seed = tuned, config, seed
        self.device = next(tuned.parameters()).device
        graph = tuned.plan.graph
        self.images, labels = check_samples(graph, support)
        self.x = torch.from_numpy(self.images).to(self.device)
        self.y = torch.from_numpy(labels).to(self.device)
        self.q: Tensor | None = None
        if config.entropy:
            if queries is None:
                raise UsageError("the entropy of what queries?", hint="fine_tune(..., queries=x)")
            self.q = torch.from_numpy(check_inputs(graph, queries)).to(self.device)
        self.head = tuned.head()
        self.known: dict[str, Tensor] = {}
        if self.head is not None:
            tuned.refresh(self.x, self.y)  # says now which class has no sample
            if config.prototypes == "moving":
                self.known = tuned.prefix(self.x)  # the frozen layers see the support set once

    def loss(self, step: int) -> Tensor:
        z = pseudo_query(self.images, self.config, seed=self.seed, step=step)
        asked = [torch.from_numpy(z).to(self.device)]
        if self.q is not None:
            asked.append(self.q)
        logits = self._logits(torch.cat(asked))
        n = len(self.x)
        loss = F.cross_entropy(logits[:n], self.y)
        if self.q is not None:
            log = logits[n:].log_softmax(1)
            loss = loss - self.config.entropy * (log.exp() * log).sum(1).mean()
        return loss

    def _logits(self, asked: Tensor) -> Tensor:
        if self.head is None:
            return self.tuned(asked)
        if self.config.prototypes == "moving":
            prototypes, scale, bias = self.head
            n = len(self.x)
            new = self.tuned.prefix(asked)
            both = {name: torch.cat([old, new[name]]) for name, old in self.known.items()}
            features = self.tuned.features_after(both)
            means = class_means(features[:n], self.y, len(prototypes))
            return cosine(features[n:], means, scale, bias)
        if self.config.prototypes == "refreshed":
            self.tuned.refresh(self.x, self.y)
        return self.tuned(asked)

    def finish(self) -> None:
        if self.head is not None and self.config.prototypes != "fixed":
            self.tuned.refresh(self.x, self.y)


def task_accuracy(tuned: nn.Module, query: tuple[Array, Array]) -> float:
    """Share of the queries (m, ...), (m,) that a model, after `fine_tune`, gets right.

    Raises Diverged for outputs that are not finite.
    """
    logits = predict(tuned, torch.from_numpy(np.asarray(query[0], np.float32)))
    if not np.isfinite(logits).all():
        raise Diverged("the outputs are not finite after training", hint="a smaller learning rate")
    return float((logits.argmax(1) == np.asarray(query[1])).mean())
