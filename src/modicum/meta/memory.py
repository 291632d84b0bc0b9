"""What an inner step keeps and computes, for every set of layers that it may update.

The figures come from the program that the step is lowered to, for one sample, times the samples
of the support set, which pass at once; a gradient of a weight is there once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from modicum.attended import without_attention
from modicum.capture import capture
from modicum.graph import Graph
from modicum.lower import Loss, Program, lower, lower_inference
from modicum.optim import SGD
from modicum.selection import Selection, Slice, Update
from modicum.stream import dynamic_by_step


class StepMemory:
    """Peak dynamic memory and MACs of the inner steps of a net on `samples` of a shape.

    `slices` are those of a layer's weight that are computed at most, in the place of attention that
    chooses them; `batch_norms`: norms use the statistics of the batch, and so keep their inputs.
    """

    def __init__(
        self,
        net: nn.Module,
        sample: tuple[int, ...],
        samples: int,
        slices: Mapping[str, Slice] | None = None,
        batch_norms: bool = True,
        loss: Loss = "cross_entropy",
    ) -> None:
        net = without_attention(net).cpu().eval()
        self.graph: Graph = capture(net, torch.zeros(1, *sample))
        self.samples, self.slices, self.loss = samples, dict(slices or {}), loss
        norms = [n.name for n in self.graph.nodes if n.op == "batch_norm"]
        self.norms = tuple(norms) if batch_norms else ()
        self._programs: dict[frozenset[str], Program] = {}
        self._peaks: dict[frozenset[str], int] = {}

    def program(self, layers: frozenset[str]) -> Program:
        """Of a step that updates weight and bias of these layers; of none, a forward pass."""
        if not layers:
            return lower_inference(self.graph)
        if layers not in self._programs:
            updates = []
            for param in self.graph.trainable():
                layer, _, leaf = param.rpartition(".")
                if layer in layers:
                    s = self.slices.get(layer, Slice())
                    updates.append(
                        Update(param=param, slice=s if leaf == "weight" else Slice(out=s.out))
                    )
            selection = Selection(updates=tuple(updates), batch_norms=self.norms)
            self._programs[layers] = lower(self.graph, selection, SGD(), self.loss)
        return self._programs[layers]

    def peak(self, layers: frozenset[str]) -> int:
        """Peak dynamic memory: the bytes that a backward pass holds at most.

        What it keeps, and gradients; a forward pass alone, which a prediction takes too, may hold
        more for a moment: see `forward_peak`.
        """
        if layers not in self._peaks:
            self._peaks[layers] = dynamic_bytes(self.program(layers), self.samples)[1]
        return self._peaks[layers]

    def forward_peak(self, layers: frozenset[str]) -> int:
        """The bytes that the forward pass of a step holds at most, what it keeps included."""
        return dynamic_bytes(self.program(layers), self.samples)[0]

    def macs(self, layers: frozenset[str]) -> tuple[int, int]:
        """(forward, backward) of a step, of all samples."""
        each = self.program(layers).macs.values()
        forward, backward = sum(m.forward for m in each), sum(m.dx + m.dw for m in each)
        return self.samples * forward, self.samples * backward


def dynamic_bytes(program: Program, samples: int) -> tuple[int, int]:
    """The most bytes live at once in the (forward, backward) part of a step, all samples passing
    together; beside weights, optimiser state and accumulators."""
    most = [0, 0]
    for step, held in zip(program.steps, dynamic_by_step(program, samples), strict=True):
        part = 0 if step.phase in ("forward", "save") else 1
        most[part] = max(most[part], held)
    return most[0], most[1]
