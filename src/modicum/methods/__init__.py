"""One file per method: a frozen config that selects what to update."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modicum.methods.base import Limits, Method, Observed, ObservingMethod
from modicum.methods.bias import Bias
from modicum.methods.explicit import Explicit
from modicum.methods.full import Full
from modicum.methods.inspect import Inspect
from modicum.methods.last import Last
from modicum.methods.mobiletl import Blocks, MobileTL
from modicum.methods.norm import Norm
from modicum.methods.sparse_update import SparseUpdate
from modicum.methods.tinytl import TinyTL
from modicum.methods.tinytrain import TinyTrain

_ALL: tuple[type[Method], ...] = (
    *(Full, TinyTrain, SparseUpdate, Blocks, MobileTL, TinyTL, Last, Bias, Norm, Explicit),
    Inspect,
)

METHODS: dict[str, type[Method]] = {cls.model_fields["kind"].default: cls for cls in _ALL}

AnyMethod = Annotated[
    Full
    | TinyTrain
    | SparseUpdate
    | Blocks
    | MobileTL
    | TinyTL
    | Last
    | Bias
    | Norm
    | Explicit
    | Inspect,
    Field(discriminator="kind"),
]

__all__ = [
    "METHODS",
    "AnyMethod",
    "Bias",
    "Blocks",
    "Explicit",
    "Full",
    "Inspect",
    "Last",
    "Limits",
    "Method",
    "MobileTL",
    "Norm",
    "Observed",
    "ObservingMethod",
    "SparseUpdate",
    "TinyTL",
    "TinyTrain",
]
