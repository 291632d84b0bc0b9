"""One file per method: a frozen config that selects what to update."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modicum.methods.base import Method
from modicum.methods.bias import Bias
from modicum.methods.explicit import Explicit
from modicum.methods.full import Full
from modicum.methods.last import Last

METHODS: dict[str, type[Method]] = {
    cls.model_fields["kind"].default: cls for cls in (Full, Last, Bias, Explicit)
}

AnyMethod = Annotated[Full | Last | Bias | Explicit, Field(discriminator="kind")]

__all__ = ["METHODS", "AnyMethod", "Bias", "Explicit", "Full", "Last", "Method"]
