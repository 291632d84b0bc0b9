"""What a model computes: values, nodes and parameters as a plain SSA list, without torch.

A `Graph` describes one sample (batch dimension 1).  Shapes are PyTorch's: images are
``(1, channels, height, width)``, vectors ``(1, features)``.  It prints itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, model_validator

from modicum.errors import InvalidInput

Shape = tuple[int, ...]
Dtype = Literal["f32"]
if TYPE_CHECKING:
    from typing import Self

    Attr = Any  # each operator knows the types of its own
else:
    Attr = int | float | bool | str | tuple[StrictInt, ...] | tuple[float, ...] | None

ITEM_BYTES: dict[Dtype, int] = {"f32": 4}


class Frozen(BaseModel):
    """Base of everything that is data: immutable, and no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but what was derived of the fields before is not taken along."""
        made = super().model_copy(update=update, deep=deep)
        if update:
            for name in made.__dict__.keys() - type(self).model_fields.keys():
                del made.__dict__[name]
        return made


class Value(Frozen):
    """The result of a node, or the input.  `bytes` is its size for one sample."""

    name: str
    shape: Shape
    dtype: Dtype = "f32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


class Derived(Frozen):
    """A constant that is computed from entries of the model's state when it is read.

    fold_weight: ``w * gamma / sqrt(var + eps)``; fold_bias: ``beta + (b - mean) * gamma /
    sqrt(var + eps)``; rstd: ``1 / sqrt(var + eps)``; standardise: ``(w - mean) / sqrt(var + eps)``
    with the mean and the biased variance of each output channel; full: `fill` everywhere.
    """

    kind: Literal["fold_weight", "fold_bias", "rstd", "standardise", "full"]
    sources: dict[str, str] = {}
    eps: float = 0.0
    fill: float = 0.0


class Param(Frozen):
    """An entry of the model's state dict, or a constant derived from several."""

    name: str
    shape: Shape
    dtype: Dtype = "f32"
    trainable: bool = True
    derived: Derived | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


class Node(Frozen):
    """One operator.  Its name is also the name of the value that it defines."""

    name: str
    op: str
    inputs: tuple[str, ...]
    params: dict[str, str] = {}
    attrs: dict[str, Attr] = {}
    module: str = ""


class Graph(Frozen):
    """Nodes in execution order over named values and parameters."""

    input: str
    output: str
    values: dict[str, Value]
    params: dict[str, Param]
    nodes: tuple[Node, ...]

    @model_validator(mode="after")
    def _names_resolve(self) -> Graph:
        defined = {self.input}
        for key, value in self.values.items():
            if key != value.name or any(n < 1 for n in value.shape):
                raise ValueError(f"value {key!r} is malformed: {value}")
        for key, param in self.params.items():
            if key != param.name or any(n < 1 for n in param.shape):
                raise ValueError(f"parameter {key!r} is malformed: {param}")
        for node in self.nodes:
            for name in node.inputs:
                if name not in defined:
                    raise ValueError(f"node {node.name!r} reads {name!r} before it is defined")
            for name in node.params.values():
                if name not in self.params:
                    raise ValueError(f"node {node.name!r} uses unknown parameter {name!r}")
            if node.name in defined:
                raise ValueError(f"value {node.name!r} is defined twice")
            defined.add(node.name)
        if self.output not in defined:
            raise ValueError(f"output {self.output!r} is not computed")
        if defined != set(self.values):
            raise ValueError(f"values and nodes differ: {sorted(defined ^ set(self.values))}")
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the structure: nodes, shapes and parameter names, not the weights."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each value, in order."""
        users: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return {name: tuple(nodes) for name, nodes in users.items()}

    def users_of(self, param: str) -> list[tuple[Node, str]]:
        """The (node, role) pairs that use a parameter."""
        return [
            (node, role)
            for node in self.nodes
            for role, name in node.params.items()
            if name == param
        ]

    def layers(self) -> Iterator[Node]:
        """Nodes that have trainable parameters, in order."""
        for node in self.nodes:
            if any(self.params[name].trainable for name in node.params.values()):
                yield node

    def trainable(self) -> list[str]:
        """Names of the parameters that a plan may train, in the order of their layers."""
        names = (name for node in self.nodes for name in node.params.values())
        return [n for n in dict.fromkeys(names) if self.params[n].trainable]

    def shape(self, name: str) -> Shape:
        return self.values[name].shape

    def check_params(self, shapes: dict[str, Shape], where: str) -> None:
        """Raise InvalidInput unless a state dict with these shapes belongs to this graph."""
        wanted = {p.name: p.shape for p in self.params.values() if p.derived is None}
        missing = [n for n in wanted if n not in shapes]
        wrong = [n for n in wanted if n in shapes and shapes[n] != wanted[n]]
        if missing or wrong:
            lines = [f"{n} is missing" for n in missing[:4]]
            lines += [f"{n} is {shapes[n]}, the graph has {wanted[n]}" for n in wrong[:4]]
            raise InvalidInput(
                f"{where} does not belong to this graph",
                why="; ".join(lines),
                hint="capture and plan the model that you pass here",
            )

    def __str__(self) -> str:
        lines = [f"{self.input}  {'x'.join(map(str, self.shape(self.input)))}"]
        for node in self.nodes:
            shape = "x".join(map(str, self.shape(node.name)))
            attrs = " ".join(f"{k}={v}" for k, v in node.attrs.items())
            lines.append(
                f"{node.name}  {shape} = {node.op}({', '.join(node.inputs)})"
                + (f" [{', '.join(node.params.values())}]" if node.params else "")
                + (f" {attrs}" if attrs else "")
            )
        return "\n".join(lines)
