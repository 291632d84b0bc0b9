"""One file per method: a frozen config that selects what to update."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modicum.methods.base import Method
from modicum.methods.bias import Bias
from modicum.methods.explicit import Explicit
from modicum.methods.full import Full
from modicum.methods.last import Last
from modicum.methods.mobiletl import Blocks, MobileTL
from modicum.methods.norm import Norm
from modicum.methods.tinytl import TinyTL

_ALL: tuple[type[Method], ...] = (Full, Blocks, MobileTL, TinyTL, Last, Bias, Norm, Explicit)

METHODS: dict[str, type[Method]] = {cls.model_fields["kind"].default: cls for cls in _ALL}

AnyMethod = Annotated[
    Full | Blocks | MobileTL | TinyTL | Last | Bias | Norm | Explicit,
    Field(discriminator="kind"),
]

__all__ = [
    "METHODS",
    "AnyMethod",
    "Bias",
    "Blocks",
    "Explicit",
    "Full",
    "Last",
    "Method",
    "MobileTL",
    "Norm",
    "TinyTL",
]
