"""ANIL: almost no inner loop, the head alone learns a task."""

from __future__ import annotations

from typing import Literal

from torch import nn

from modicum.heads import last_linear
from modicum.meta.maml import MAML


class ANIL(MAML):
    """MAML whose inner rule moves the last linear layer alone.

    Raghu et al., ICLR 2020 (arXiv 1909.09157).
    """

    kind: Literal["anil"] = "anil"  # type: ignore[assignment]

    def moving(self, net: nn.Module) -> set[str]:
        head = last_linear(net)[0]
        return {name for name in super().moving(net) if name.startswith(f"{head}.")}
