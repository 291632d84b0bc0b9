"""Where tasks come from: images, or whatever else has a support and a query set."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from modicum.tasks import (
    Augment,
    FixedEpisodes,
    Labelled,
    Preprocess,
    arrays,
    draw_task,
    take,
)

Array = NDArray[Any]
Drawn = tuple[Array, Array, Array, Array]
"""Support (n, ...), (n,) and query (m, ...), (m,) of a task: labels, or float targets."""

KEEP_BYTES = 1 << 30
"""A dataset whose images take less as float32 is kept in memory as a whole."""


@runtime_checkable
class TaskSource(Protocol):
    """Tasks without end; all of the same size, so that several fit in one batch."""

    def draw(self, seed: int, index: int, train: bool = False) -> Drawn:
        """Task `index` of those that `seed` makes: a pure function, but for `train`, which says
        that a task may be augmented."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the source is; of two that differ it differs."""
        ...


class Episodes:
    """Few-shot tasks of a labelled dataset.  Raises InvalidInput where it is too small."""

    def __init__(
        self,
        dataset: Labelled,
        preprocess: Preprocess,
        rule: FixedEpisodes | None = None,
        augment: Augment | None = None,
        apart: bool = False,
    ) -> None:
        self.dataset, self.preprocess, self.rule = dataset, preprocess, rule or FixedEpisodes()
        self.augment, self.apart = augment, apart
        self._images: Array | None = None
        self._row: dict[int, int] = {}

    def draw(self, seed: int, index: int, train: bool = False) -> Drawn:
        task = draw_task(self.dataset, self.rule, seed=seed, index=index, apart=self.apart)
        augment = self.augment if train else None
        made = []
        for epoch, part in ((2 * index, task.support), (2 * index + 1, task.query)):
            if augment is None and self._kept():
                assert self._images is not None
                x = self._images[[self._row[int(i)] for i in part.index]]
                made += [x, part.labels.astype(np.int64)]
            else:
                everything = np.arange(len(part))
                made += take(
                    part, self.preprocess, everything, seed=seed, epoch=epoch, augment=augment
                )
        xs, ys, xq, yq = made
        return xs, ys, xq, yq

    def _kept(self) -> bool:
        """Whether the whole dataset lies in memory; read at the first task."""
        if self._images is None:
            size = 4 * len(self.dataset) * int(np.prod(self.preprocess.shape))
            if size > KEEP_BYTES:
                return False
            self._images = arrays(self.dataset, self.preprocess)[0]
            self._row = {int(i): row for row, i in enumerate(self.dataset.index)}
        return True

    def fingerprint(self) -> dict[str, Any]:
        """Names, labels and an image of each class, without decoding all of them."""
        dataset = self.dataset
        digest = hashlib.sha256(json.dumps([dataset.classes, dataset.names]).encode())
        digest.update(np.ascontiguousarray(dataset.labels, "<i8").tobytes())
        for first in np.unique(dataset.labels, return_index=True)[1]:
            digest.update(np.ascontiguousarray(dataset.image(int(first))).tobytes())
        return {
            "images": len(dataset),
            "sha256": digest.hexdigest(),
            "preprocess": self.preprocess.model_dump(mode="json"),
            "rule": self.rule.model_dump(mode="json"),
            "apart": self.apart,
        }


class Sines:
    """Regression of y = a sin(x - p): a ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5] (MAML, 5.1).

    x (n, 1) and y (n, 1) float32; `shots` points of support and `queries` of query.
    """

    def __init__(self, shots: int = 10, queries: int = 10) -> None:
        self.shots, self.queries = shots, queries

    def draw(self, seed: int, index: int, train: bool = False) -> Drawn:
        rng = np.random.default_rng([seed, index])
        amplitude, phase = rng.uniform(0.1, 5.0), rng.uniform(0.0, np.pi)
        parts = []
        for n in (self.shots, self.queries):
            x = rng.uniform(-5.0, 5.0, (n, 1)).astype(np.float32)
            parts += [x, (amplitude * np.sin(x - phase)).astype(np.float32)]
        xs, ys, xq, yq = parts
        return xs, ys, xq, yq

    def fingerprint(self) -> dict[str, Any]:
        return {"sines": [self.shots, self.queries]}
