"""BOIL: body only update in inner loop, the head never learns a task."""

from __future__ import annotations

from typing import Literal

from torch import nn

from modicum.heads import last_linear
from modicum.meta.maml import MAML


class BOIL(MAML):
    """MAML whose inner rule moves everything but the last linear layer.

    Oh et al., ICLR 2021 (arXiv 2008.08882).
    """

    kind: Literal["boil"] = "boil"  # type: ignore[assignment]

    def moving(self, net: nn.Module) -> set[str]:
        head = last_linear(net)[0]
        return {name for name in super().moving(net) if not name.startswith(f"{head}.")}
