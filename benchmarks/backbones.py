"""The three microcontroller backbones with their published weights.

They are looked for as weights/NAME.npz and weights/NAME.json in the folder MODICUM_SHARED.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from modicum.models import MODELS, load_weights

NAMES = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")
SHARED = Path(os.environ.get("MODICUM_SHARED", Path(__file__).parents[1] / ".." / "shared"))


def load(name: str, classes: int | None = 10, seed: int = 0) -> nn.Module:
    """One backbone in eval mode; `classes` replaces the head (None keeps the 1,000 classes)."""
    torch.manual_seed(seed)
    net = MODELS[name].make(MODELS[name].classes if classes is None else classes)
    load_weights(net, SHARED / "weights" / f"{name}.npz")
    return net.eval()
