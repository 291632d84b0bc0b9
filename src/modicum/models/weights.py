"""Published weights into our networks: all of them, or nothing and an error that says why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.attended import attach_as_in, detach
from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.methods.tinytl import in_lite
from modicum.models.inverted_residual import Backbone
from modicum.models.sources import SOURCES, names

OWN = "own"
HEAD = ("classifier.weight", "classifier.bias")
LISTED = 4


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did: whose names the weights had, how many entries, what it left."""

    source: str
    entries: int
    fresh: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        text = f"loaded {self.entries} entries ({self.source} names)"
        return f"{text}; {', '.join(self.fresh)} as initialised: {self.why}" if self.fresh else text


def load_weights(
    net: nn.Module, weights: Mapping[str, Tensor] | str | Path, source: str = "auto"
) -> Loaded:
    """Load a state dict or a file into `net`, and return what was done.

    `weights` is a state dict, or a path: .pt and .pth (read with weights_only), .safetensors, or
    int8 arrays NAME.npz with their table NAME.json beside them.  `source` says whose names the
    entries have: torchvision, timm, efficientnet-lite-pytorch, proxylessnas, int8, or own, the
    net's own names, which is all that a net from elsewhere can load; auto tells by the names.

    Weights for another number of classes leave the classifier of a `Backbone` as initialised.
    num_batches_tracked is ignored.  Channel attention that p-Meta has learned becomes part of the
    net's layers.  Anything else that does not fit raises InvalidInput, and the
    net is as it was.

    >>> from modicum.models import MobileNetV2
    >>> print(load_weights(MobileNetV2(5, 0.1), MobileNetV2(1000, 0.1).state_dict()).why)
    1000 classes in the weights, 5 in the net
    """
    state = read_weights(weights) if isinstance(weights, str | Path) else _checked(weights)
    attended = attach_as_in(net, state)
    try:
        return _load(net, state, source)
    except ModicumError:
        detach(net, attended)
        raise


def _load(net: nn.Module, state: Mapping[str, Tensor], source: str) -> Loaded:
    if source == "auto":
        source = _source(net, state)
    theirs, strangers = _renamed(net, state, source)
    target = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    target = {k: v for k, v in target.items() if not _ignored(k)}
    dropped = _other_classes(net, theirs, target)

    both = [k for k in target if k in theirs and k not in dropped]
    wrong = [text for k in both if (text := _misfit(k, *theirs[k], target[k]))]
    missing = [f"{k} {_x(v)} is in the net only" for k, v in target.items() if k not in theirs]
    strangers += [name for ours, (name, _) in theirs.items() if ours not in target]
    strange = [f"{name} {_x(state[name])} is in the weights only" for name in strangers]
    if where := [*_some(wrong), *_some(missing), *_some(strange)]:
        raise InvalidInput(
            f"the weights ({source} names) do not fit {type(net).__name__}; nothing was loaded",
            where=where,
            hint=_hint(net, state),
        )

    loaded = {k: theirs[k][1].reshape(v.shape) for k, v in target.items() if k not in dropped}
    net.load_state_dict({**net.state_dict(), **loaded})
    if not dropped:
        return Loaded(source, len(loaded))
    there, here = len(theirs[HEAD[0]][1]), len(target[HEAD[0]])
    why = f"{there} classes in the weights, {here} in the net"
    return Loaded(source, len(loaded), ("classifier",), why)


def _source(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    if isinstance(net, Backbone):
        own = net.state_dict()
        for name, source in SOURCES.items():
            if source.mark in state and source.mark not in own:
                return name
    return OWN


def _renamed(
    net: nn.Module, state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """{our entry: (their entry, tensor)}, and the entries of which the net has no module."""
    state = {name: tensor for name, tensor in state.items() if not _ignored(name)}
    if source == OWN:
        return {name: (name, tensor) for name, tensor in state.items()}, []
    if not isinstance(net, Backbone):
        raise UsageError(
            f"{type(net).__name__} is none of modicum's networks: it loads its own names only",
            hint=f"source={OWN!r}",
        )
    mapping = names(net, source)
    theirs, strangers = {}, []
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in mapping:
            theirs[f"{mapping[module]}.{leaf}"] = (name, tensor)
        else:
            strangers.append(name)
    return theirs, strangers


def _other_classes(
    net: nn.Module, theirs: dict[str, tuple[str, Tensor]], target: dict[str, Tensor]
) -> tuple[str, ...]:
    """The classifier's entries where only their number of classes differs, otherwise none."""
    if not isinstance(net, Backbone) or any(name not in theirs for name in HEAD):
        return ()
    weight, bias = (theirs[name][1] for name in HEAD)
    here, width = target[HEAD[0]].shape
    there = len(bias) if bias.dim() == 1 else here
    fits = weight.shape in ((there, width), (there, width, 1, 1))
    return HEAD if fits and there != here else ()


def _misfit(ours: str, name: str, tensor: Tensor, want: Tensor) -> str:
    """Why an entry does not go into the net's; empty where it does.

    A linear layer of ours may be a 1x1 convolution of theirs.
    """
    called = ours if name == ours else f"{ours} ({name})"
    if tensor.shape not in (want.shape, (*want.shape, 1, 1)):
        return f"{called} is {_x(want)} in the net, {_x(tensor)} in the weights"
    if tensor.is_floating_point() != want.is_floating_point():
        return f"{called} is {want.dtype} in the net, {tensor.dtype} in the weights"
    return "" if torch.isfinite(tensor).all() else f"{called} is not finite in the weights"


def _hint(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    if state and all(name.startswith("module.") for name in state):
        return "the names without their 'module.': {k[7:]: v for k, v in state.items()}"
    ours, theirs = (any(map(in_lite, entries)) for entries in (net.state_dict(), state))
    if theirs and not ours:
        return (
            "they are of a net with TinyTL's lite modules: load them into prepare_model(net, "
            "example, method), with the method that they were trained by; on the command line "
            "name it, as --method tinytl or in a plan"
        )
    if ours and not theirs:
        return "load them into the net first, and put lite modules into it after that"
    if isinstance(net, Backbone):
        ours, theirs = (
            any(name.endswith("running_var") for name in entries)
            for entries in (net.state_dict(), state)
        )
        if ours and not theirs:
            return f"the net with its norms folded: {type(net).__name__}(style=FOLDED)"
        if theirs and not ours:
            return f"the net with its norms: {type(net).__name__}(style=Style())"
    return (
        "a net of the same architecture and width: MODELS, and the documentation's page on models"
    )


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - LISTED
    return [*lines[:LISTED], f"and {more} more like this"] if more > 1 else lines


# ---- what comes from outside -----------------------------------------------------------------


def read_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a file of one of the kinds that `load_weights` takes."""
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}")
    try:
        if path.suffix == ".npz":
            return _dequantised(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _checked(load_file(path))
        return _checked(torch.load(path, map_location="cpu", weights_only=True))
    except InvalidInput:
        raise
    except Exception as error:  # each of the readers has exceptions of its own
        raise InvalidInput(
            f"cannot read the weights {path}",
            why=(str(error).strip() or type(error).__name__).splitlines()[:4],
            hint="a state dict as .pt (torch.save(net.state_dict(), path)) or .safetensors",
        ) from error


def _checked(state: Any) -> Mapping[str, Tensor]:
    """A mapping of names to tensors."""
    if not isinstance(state, Mapping):
        raise InvalidInput(
            f"the weights are {type(state).__name__}, not a state dict",
            hint="torch.save(net.state_dict(), path)",
        )
    others = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if others:
        inner = [k for k in others if isinstance(state[k], Mapping)]
        raise InvalidInput(
            "the weights are no state dict: not every entry is a tensor",
            where=[f"{k!r} is {type(state[k]).__name__}" for k in others[:LISTED]],
            hint=f"load_weights(net, checkpoint[{inner[0]!r}])" if inner else None,
        )
    return state


def _dequantised(path: Path) -> dict[str, Tensor]:
    """NAME.npz and NAME.json to float32.

    weight = NAME.weight * NAME.w_scales per output channel, bias = NAME.bias * x_scale *
    NAME.w_scales, with x_scale from the layer's row in the table.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise InvalidInput(
            f"{path} has no table {beside.name} beside it",
            why="int8 weights need the scale of each layer's input",
        )
    state: dict[str, Tensor] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for layer in json.loads(beside.read_text())["layers"]:
            name, x_scale = layer["name"], layer["x_scale"]
            if f"{name}.weight" not in arrays:
                continue  # a residual sum
            weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
            scales = arrays[f"{name}.w_scales"].astype(np.float32)
            if len({len(weight), len(scales), bias.size}) > 1 or not math.isfinite(x_scale):
                raise InvalidInput(
                    f"{path}: {name} does not agree with itself",
                    why=f"weight {weight.shape}, w_scales {scales.shape}, bias {bias.shape}, "
                    f"x_scale {x_scale}",
                )
            rows = weight.reshape(len(scales), -1).astype(np.float32) * scales[:, None]
            shift = bias.reshape(-1).astype(np.float32) * x_scale * scales
            state[f"{name}.weight"] = torch.from_numpy(rows.reshape(weight.shape))
            state[f"{name}.bias"] = torch.from_numpy(shift)
    return state


def _ignored(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _x(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
