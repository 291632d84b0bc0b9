"""From labelled images to arrays for a network: preprocessing, augmentation, batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from modicum.errors import InvalidInput, UsageError
from modicum.graph import Frozen
from modicum.tasks import draws
from modicum.tasks.images import Box, Interpolation, Pixels, resample, with_channels
from modicum.tasks.labelled import Labelled

Side = Annotated[int, Field(ge=1, le=1 << 14)]
Finite = Annotated[float, Field(gt=float("-inf"), lt=float("inf"))]
Positive = Annotated[float, Field(gt=0.0, lt=float("inf"))]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Batch = tuple[NDArray[np.float32], NDArray[np.int64]]

TRIES = 10
"""Boxes drawn for a random crop before the largest that fits is taken."""


class Preprocess(Frozen):
    """What a model wants: `size` (a side, or height and width), ``(x - mean) / std``.

    An image is resized until its shorter side is `resize` long, and the centre of it is taken;
    without `resize`, until it just covers `size`.  uint8 becomes 0 .. 1 first, floats stay as they
    are.  `mean` and `std` have one value per channel, and so say how many channels the model has:
    grey images are repeated for 3, colours become grey for 1.
    """

    size: Side | tuple[Side, Side]
    mean: tuple[Finite, ...] = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    resize: Side | None = None
    interpolation: Interpolation = "bilinear"

    @model_validator(mode="after")
    def _fits(self) -> Preprocess:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError("mean and std need one value for each channel")
        if self.resize is not None and self.resize < max(self.shape[1:]):
            raise ValueError(f"resize {self.resize} is smaller than the size {self.size}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what comes out."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return len(self.mean), height, width


class Augment(Frozen):
    """What training sees of an image, drawn anew for every (seed, epoch, index).

    `crop`: "resized" takes a box of a share of the area in `scale` with an aspect ratio in
    `ratio` (log-uniform) and resizes it; "pad" resizes as for evaluation, then shifts by up to
    `pad` pixels in each direction, with black coming in; "none" does neither.  `flip`: every
    second image is mirrored, left to right; not for digits, letters or signs.
    """

    crop: Literal["resized", "pad", "none"] = "resized"
    scale: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    pad: Annotated[int, Field(ge=0, le=1 << 12)] = 4
    flip: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("scale and ratio are (smallest, largest)")
        return self


class Position(Frozen):
    """Where a stream goes on: all epochs before `epoch` are done, and `step` batches of it."""

    epoch: Annotated[int, Field(ge=0)] = 0
    step: Annotated[int, Field(ge=0)] = 0


def take(
    dataset: Labelled,
    preprocess: Preprocess,
    indices: ArrayLike,
    *,
    seed: int = 0,
    epoch: int = 0,
    augment: Augment | None = None,
) -> Batch:
    """x (b, c, h, w) float32 and y (b,) int64 of the images at these positions.

    A pure function: the same arguments give the same images, in any order and in any worker.
    Raises InvalidInput for a broken image.
    """
    at = np.asarray(indices, dtype=np.int64).reshape(-1)
    if at.size and (at.min() < 0 or at.max() >= len(dataset)):
        raise UsageError(f"positions from {at.min()} to {at.max()} in {len(dataset)} images")
    channels, height, width = preprocess.shape
    std = np.array(preprocess.std, np.float32)[:, None, None]
    shift = np.array(preprocess.mean, np.float32)[:, None, None] / std
    factor = {True: np.float32(1 / 255) / std, False: 1 / std}
    chances = None
    if augment is not None:
        chances = draws.uniform(seed, draws.AUGMENT, epoch, at, 1 + 4 * TRIES)
    x = np.empty((len(at), channels, height, width), np.float32)
    for row, i in enumerate(at.tolist()):
        pixels = with_channels(dataset.image(i), channels, f"image {dataset.names[i]!r}")
        if augment is None or chances is None:
            seen = _evaluated(pixels, preprocess)
        else:
            seen = _augmented(pixels, preprocess, augment, chances[row])
        np.multiply(seen.transpose(2, 0, 1), factor[seen.dtype == np.uint8], out=x[row])
        x[row] -= shift
    return x, dataset.labels[at]


def arrays(dataset: Labelled, preprocess: Preprocess) -> Batch:
    """All images in order, as for evaluation: what `modicum.adapt` takes.  See `take`."""
    return take(dataset, preprocess, np.arange(len(dataset)))


def steps(dataset: Labelled, batch: int, *, drop_last: bool = False) -> int:
    """Batches per epoch.  Raises UsageError where there would be none."""
    if batch < 1:
        raise UsageError(f"a batch cannot have {batch} images")
    n = len(dataset) // batch if drop_last else -(-len(dataset) // batch)
    if not n:
        raise UsageError(
            f"{len(dataset)} images do not fill a batch of {batch}", hint="a smaller batch"
        )
    return n


def batches(
    dataset: Labelled,
    preprocess: Preprocess,
    batch: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    augment: Augment | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    start: int = 0,
) -> Iterator[Batch]:
    """(x, y) of one epoch, each image once, in an order drawn from seed and epoch.

    `start` leaves out that many batches; the others are as if it had not.  See `take`.
    """
    n = steps(dataset, batch, drop_last=drop_last)
    if not 0 <= start <= n or epoch < 0:
        raise UsageError(f"there is no batch {start} in epoch {epoch}", why=f"an epoch has {n}")
    if shuffle:
        order = draws.permutation(seed, epoch, len(dataset))
    else:
        order = np.arange(len(dataset), dtype=np.int64)
    return (
        take(
            dataset,
            preprocess,
            order[k * batch : (k + 1) * batch],
            seed=seed,
            epoch=epoch,
            augment=augment,
        )
        for k in range(start, n)
    )


class Stream:
    """Batches of many epochs; `at` is the Position of the next one, to be saved and resumed from.

    ``Stream(..., at=saved)`` with the other arguments unchanged goes on with the batch that would
    have come next.  Without `epochs` it never ends.  See `batches`.
    """

    def __init__(
        self,
        dataset: Labelled,
        preprocess: Preprocess,
        batch: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        augment: Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        at: Position = Position(),  # noqa: B008  (it is frozen)
    ) -> None:
        self.steps = steps(dataset, batch, drop_last=drop_last)
        if at.step > self.steps:
            raise InvalidInput(
                f"the position is at step {at.step} of an epoch of {self.steps}",
                why="it was saved with another dataset or another batch",
            )
        self.at = at
        self.batch, self.epochs, self.seed = batch, epochs, seed
        self._arguments = (dataset, preprocess, batch)
        self._options: dict[str, Any] = {
            "seed": seed,
            "augment": augment,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self.at.step == self.steps:
                self.at = Position(epoch=self.at.epoch + 1)
            if self.epochs is not None and self.at.epoch >= self.epochs:
                return
            epoch, step = self.at.epoch, self.at.step
            rest = batches(*self._arguments, epoch=epoch, start=step, **self._options)
            for done, made in enumerate(rest, start=step + 1):
                last = done == self.steps
                self.at = Position(epoch=epoch + last, step=0 if last else done)
                yield made


# ---- which part of an image is seen ------------------------------------------------------------


def _evaluated(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """(h, w, c or 1): resize and centre crop."""
    size = preprocess.shape[1:]
    box = _centre(pixels.shape, size, preprocess.resize)
    return resample(pixels, box, size, preprocess.interpolation)


def _augmented(
    pixels: Pixels, preprocess: Preprocess, augment: Augment, chance: NDArray[np.float64]
) -> Pixels:
    """(h, w, c or 1): crop and flip, as the chances (1 + 4 * TRIES,) in [0, 1) fall."""
    if augment.crop == "resized":
        box = _random_box(pixels.shape, augment, chance[1:])
        seen = resample(pixels, box, preprocess.shape[1:], preprocess.interpolation)
    else:
        seen = _evaluated(pixels, preprocess)
    if augment.crop == "pad" and augment.pad:
        down, right = (int(c * (2 * augment.pad + 1)) - augment.pad for c in chance[1:3])
        seen = _shift(seen, down, right)
    return seen[:, ::-1] if augment.flip and chance[0] < 0.5 else seen


def _centre(shape: tuple[int, ...], size: tuple[int, int], resize: int | None) -> Box:
    """The box that a resize and a centre crop of the result would keep, in source pixels.

    The sides of the resized image and the corner of the crop are rounded to whole pixels, as they
    are where the two are done one after the other.
    """
    (h, w), (th, tw) = shape[:2], size
    if resize is None:
        wide = w * th >= tw * h
        nh, nw = (th, max(tw, w * th // h)) if wide else (max(th, h * tw // w), tw)
    else:
        nh, nw = (resize, resize * w // h) if h <= w else (resize * h // w, resize)
    top, left = round((nh - th) / 2), round((nw - tw) / 2)
    down, across = h / nh, w / nw
    return left * across, top * down, min((left + tw) * across, w), min((top + th) * down, h)


def _random_box(shape: tuple[int, ...], augment: Augment, chance: NDArray[np.float64]) -> Box:
    h, w = shape[:2]
    area, ratio, x, y = chance.reshape(4, TRIES)
    low, high = augment.scale
    areas = (low + (high - low) * area) * (h * w)
    low, high = np.log(augment.ratio)
    ratios = np.exp(low + (high - low) * ratio)
    widths, heights = np.sqrt(areas * ratios), np.sqrt(areas / ratios)
    fits = (widths <= w) & (heights <= h)
    if fits.any():
        k = int(fits.argmax())
        left, top = float((w - widths[k]) * x[k]), float((h - heights[k]) * y[k])
        return left, top, min(left + float(widths[k]), w), min(top + float(heights[k]), h)
    kept = min(max(w / h, augment.ratio[0]), augment.ratio[1])
    cw, ch = min(w, h * kept), min(h, w / kept)
    return (w - cw) / 2, (h - ch) / 2, (w + cw) / 2, (h + ch) / 2


def _shift(seen: Pixels, down: int, right: int) -> Pixels:
    """The same, moved by so many pixels, with zeros coming in."""
    h, w = seen.shape[:2]
    moved = np.zeros_like(seen)
    moved[max(down, 0) : max(h + down, 0), max(right, 0) : max(w + right, 0)] = seen[
        max(-down, 0) : max(h - down, 0), max(-right, 0) : max(w - right, 0)
    ]
    return moved
