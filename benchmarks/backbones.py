"""The three microcontroller backbones, rebuilt in PyTorch from quantised weights.

`load(name)` reads NAME.json and NAME.npz from the weights folder: fp32 weight = int8 weight *
w_scale, fp32 bias = int32 bias * x_scale * w_scale, BN folded, ReLU6 where y_zero is -128.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NAMES = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")
SHARED = Path(os.environ.get("MODICUM_SHARED", Path(__file__).parents[1] / ".." / "shared"))


class Block(nn.Module):
    def __init__(self, layers: dict[str, nn.Module], residual: bool) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.children():
            y = layer(y)
        return x + y if self.residual else y


class Backbone(nn.Module):
    """first_conv, inverted residual blocks, an optional feature_mix, global pool, classifier."""

    def __init__(self, spec: dict, arrays: dict[str, np.ndarray], classes: int | None) -> None:
        super().__init__()
        blocks: dict[str, dict[str, nn.Module]] = {}
        residuals = {e["name"] for e in spec["layers"] if "residual" in e["name"]}
        residuals |= {e["name"] for e in spec["layers"] if e.get("residual")}
        for entry in spec["layers"]:
            name = entry["name"]
            if f"{name}.weight" not in arrays:
                continue
            layer = _layer(entry, arrays)
            group, _, part = name.rpartition(".")
            if group.startswith("blocks."):
                blocks.setdefault(group, {})[part] = layer
            elif name == "classifier":
                self.classifier = layer
            else:
                setattr(self, name, layer)
        self.blocks = nn.Sequential(
            *(Block(parts, any(r.startswith(group + ".") for r in residuals))
              for group, parts in blocks.items())
        )  # fmt: skip
        if classes is not None:
            self.classifier = nn.Linear(self.classifier.in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first_conv(x))
        if hasattr(self, "feature_mix"):
            x = self.feature_mix(x)
        return self.classifier(x.mean([2, 3]))


def _layer(entry: dict, arrays: dict[str, np.ndarray]) -> nn.Module:
    name = entry["name"]
    scales = arrays[f"{name}.w_scales"].astype(np.float32)
    out, inp, groups = entry["out_channel"], entry["in_channel"], entry["groups"]
    bias = arrays[f"{name}.bias"].astype(np.float32).reshape(-1) * entry["x_scale"] * scales
    weight = arrays[f"{name}.weight"].astype(np.float32).reshape(out, -1) * scales[:, None]
    if name == "classifier":
        linear = nn.Linear(inp, out)
        linear.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        return linear
    kernel = tuple(entry["kernel_size"])
    pad = tuple(k // 2 for k in kernel)
    conv = nn.Conv2d(inp, out, kernel, entry["stride"], pad, groups=groups)
    shaped = torch.tensor(weight).reshape(conv.weight.shape)
    conv.load_state_dict({"weight": shaped, "bias": torch.tensor(bias)})
    return nn.Sequential(conv, nn.ReLU6()) if entry["y_zero"] == -128 else conv


def load(name: str, classes: int | None = 10, seed: int = 0) -> nn.Module:
    """One backbone in eval mode; `classes` replaces the head (None keeps the 1,000 classes)."""
    folder = SHARED / "weights"
    spec = json.loads((folder / f"{name}.json").read_text())
    arrays = dict(np.load(folder / f"{name}.npz"))
    torch.manual_seed(seed)
    return Backbone(spec, arrays, classes).eval()
