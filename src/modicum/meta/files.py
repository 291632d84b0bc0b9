"""What a training writes: files that are there whole or not at all, and what checks them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modicum.errors import InvalidInput


def read_state(path: Path, device: torch.device, hint: str) -> dict[str, Any]:
    """A dict that `write_state` wrote.  Raises InvalidInput for a file that is broken."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever unpickling meets
        raise InvalidInput(
            f"cannot read {path}",
            why=(str(error).strip() or type(error).__name__).splitlines()[0],
            hint=hint,
        ) from None
    if not isinstance(state, dict):
        raise InvalidInput(f"cannot read {path}", why="it holds no dict", hint=hint)
    return state


def check_inputs(path: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise InvalidInput unless the training of a checkpoint is the one that is asked for."""
    if known != given:
        odd = [k for k, value in given.items() if known.get(k) != value]
        raise InvalidInput(
            f"{path} is of another training",
            why=f"what differs: {', '.join(odd)}",
            hint="another --out, or the arguments that it was started with",
        )


def write_state(path: Path, data: Any) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(data, part)
    part.replace(path)


def weights_hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()
