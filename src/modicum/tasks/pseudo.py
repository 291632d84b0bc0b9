"""`pseudo_query`: support images made to stand in for queries, so that a task can be learnt."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from modicum.errors import UsageError
from modicum.graph import Frozen
from modicum.tasks import draws

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Images = NDArray[np.float32]


class PseudoQuery(Frozen):
    """What becomes of a support image in one step of fine-tuning.

    With `probability` it is changed, else left as it is.  `colour`: brightness, saturation and
    contrast.  `translate`: the largest shift, as a share of the side.
    """

    probability: Share = 0.9
    colour: bool = True
    translate: Share = 0.125


def pseudo_query(
    x: NDArray[Any], config: PseudoQuery, *, seed: int, step: int, first: int = 0
) -> Images:
    """Normalised images x (b, c, h, w) as pseudo-queries; a new array, float32, of the same shape.

    Colour, with m(h, w) the mean over channels and M the mean of the image::

        x + β, β ~ U[-0.5, 0.5);  (x - m) σ + m, σ ~ U[0, 2);  (x - M) κ + M, κ ~ U[0.5, 1.5)

    Then a shift of up to round(side * translate) pixels in each direction, with zeros, which are
    the mean colour, coming in.  This is DiffAugment (Zhao et al., NeurIPS 2020, arXiv 2006.10738),
    as Hu et al. (CVPR 2022, arXiv 2204.07305) use it to adapt to a task; but they change either
    the whole batch or none of it, and mirror it half of the time, which signs and letters forbid.

    Every draw is a function of (seed, step, position); row r has position `first` + r, so a
    support set may be taken in pieces.  Raises UsageError for an x that has another shape.
    """
    if x.ndim != 4 or not x.size:
        raise UsageError(f"images have shape {x.shape}", hint="(images, channels, height, width)")
    out = np.array(x, np.float32)
    positions = first + np.arange(len(x), dtype=np.int64)
    chance = draws.uniform(int(seed), draws.PSEUDO, int(step), positions, 6)
    changed = chance[:, 0] < config.probability
    if config.colour:
        _colour(out, changed, chance[:, 1:4].astype(np.float32))
    down, right = (
        np.floor(chance[:, 4 + axis] * (2 * most + 1)).astype(int) - most
        for axis, most in enumerate(int(side * config.translate + 0.5) for side in x.shape[2:])
    )
    for row in np.flatnonzero(changed & ((down != 0) | (right != 0))):
        _shift(out[row], int(down[row]), int(right[row]))
    return out


def _colour(x: Images, changed: NDArray[np.bool_], chance: Images) -> None:
    """In place.  The three maps in one: κσ x + κ(1 - σ) m + (1 - κ) M + β."""
    brightness = np.where(changed, chance[:, 0] - np.float32(0.5), 0)
    saturation = np.where(changed, chance[:, 1] * 2, 1)
    contrast = np.where(changed, chance[:, 2] + np.float32(0.5), 1)
    grey = x.mean(1, keepdims=True)
    shift = (1 - contrast) * grey.mean((1, 2, 3)) + brightness
    grey *= _each(contrast * (1 - saturation))
    grey += _each(shift)
    x *= _each(contrast * saturation)
    x += grey


def _each(values: Images) -> Images:
    return values[:, None, None, None]


def _shift(image: Images, down: int, right: int) -> None:
    """In place: (c, h, w) moved by at most its sides, with zeros coming in."""
    h, w = image.shape[1:]
    kept = image[:, max(-down, 0) : h - max(down, 0), max(-right, 0) : w - max(right, 0)].copy()
    image[:] = 0
    image[:, max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = kept
