"""Groups of traffic signs that look alike, in place of the tracks that the pictures came from.

The German traffic signs were filmed: 30 frames of one sign make a track, and the set at hand has
60 random frames of each class, in random order, without the track's number.  So tracks cannot be
told; frames of one sign may lie on both sides of a task.  With 5 shots that is so for about a
quarter of the queries.  What can be done is to group pictures of a class that look alike, and keep
a group on one side: a figure that is too low where two signs look alike, beside one that is too
high.

Each picture: mean colours of 16 x 16 cells, log(p / 255 + 0.02), standardised per picture, beside
its means and deviations; Ward linkage, cut at the number of tracks that 60 of 30 T frames hit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from modicum.tasks import Labelled

FRAMES, SIDE = 30, 16
# training pictures of each class of GTSRB (Stallkamp et al., Neural Networks 2012), by 30
TRACKS = (
    *(7, 74, 75, 47, 66, 62, 14, 48, 47, 49, 67, 44, 70, 72, 26, 21, 14, 37, 40, 7, 12, 11, 13),
    *(17, 9, 50, 20, 8, 18, 9, 15, 26, 8, 23, 14, 40, 13, 7, 69, 10, 12, 8, 8),
)


def grouped(data: Labelled) -> Labelled:
    """The same pictures with a group each; classes are called 00000 .. 00042."""
    groups = [""] * len(data)
    for label, name in enumerate(data.classes):
        at = np.flatnonzero(data.labels == label)
        found = _clusters(np.stack([_described(data.image(int(i))) for i in at]), int(name))
        for i, g in zip(at, found, strict=True):
            groups[i] = f"{name}-{g}"
    return replace(data, group=tuple(groups))


def _described(pixels: np.ndarray) -> np.ndarray:
    step = pixels.shape[0] // SIDE
    cells = pixels.reshape(SIDE, step, SIDE, step, 3).mean((1, 3))
    f = np.log(cells / 255 + 0.02)
    mean, spread = f.mean((0, 1)), f.std((0, 1))
    shape = (f - mean) / (spread + 0.02) / SIDE
    return np.concatenate([shape.ravel(), 8 * mean, 8 * spread])


def _clusters(x: np.ndarray, number: int) -> np.ndarray:
    t, n = TRACKS[number], len(x)
    total = FRAMES * t
    missed = math.comb(total - FRAMES, n) / math.comb(total, n)
    return fcluster(linkage(x, "ward"), max(2, round(t * (1 - missed))), "maxclust")
