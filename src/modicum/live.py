"""Measure what PyTorch holds: the bytes of tensors that live at once, at most."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, storages that operators make, until they are let go.

    `peak` is the most bytes at once since it was entered or `restart` was called; `now` those at
    this moment.  What was there before, such as weights, does not count; nor does what an
    operator allocates for itself alone.

    >>> x = torch.ones(1000)
    >>> with LiveBytes() as live:
    ...     y = (x * 2).sum()
    >>> live.peak
    4004
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor):  # it was there before, or has been counted
                self._know(given.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self._know(made.untyped_storage(), made.untyped_storage().nbytes())
        return out

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage that has not been seen, as so many bytes, until it is let go."""
        key = storage._cdata
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size
