"""Log-mel features of sound, with torch alone; and recordings of words as a labelled dataset.

    frame t      f_t[n] = w[n] x[t hop + n],  w a Hann window of `frame` samples
    power        P_t[k] = |sum_n f_t[n] exp(-2 pi i k n / n_fft)|^2
    mels         E_t[m] = sum_k H_m[k] P_t[k],  H_m triangles, evenly spaced in mel(f)
    features     log(max(E_t[m], floor))

with mel(f) = 2595 log10(1 + f / 700) Hz (Davis and Mermelstein, IEEE Trans. ASSP 28(4), 1980; the
scale and the triangles of height 1 as in the HTK book).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from modicum.errors import InvalidInput
from modicum.graph import Frozen
from modicum.tasks import Labelled

Samples = Annotated[int, Field(ge=1, le=1 << 20)]
Hertz = Annotated[float, Field(ge=0, le=1e6)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MAX_BYTES = 4 << 30
"""A file of recordings that unpacks to more is refused unread."""


class LogMel(Frozen):
    """Features (frames, mels) of recordings at `rate` Hz; `frame`, `hop`, `length` in samples.

    A recording becomes `length` samples long: what is shorter lies in the middle of silence, of
    what is longer the middle is taken.  With level="peak" it is first made so loud that its largest
    sample is 1, since how loud a speaker is says nothing about the word.  `floor` is the power
    below which all is silence.  `mean` and `std`, (mels,), normalise each feature: (log E - mean)
    / std; `fitted` computes them.

    >>> LogMel().shape
    (32, 20)
    """

    rate: Samples = 8000
    frame: Samples = 256
    hop: Samples = 160
    n_fft: Samples = 256
    length: Samples = 5216
    mels: Annotated[int, Field(ge=1, le=512)] = 20
    fmin: Hertz = 60.0
    fmax: Hertz = 3800.0
    floor: Positive = 1e-3
    level: Literal["peak", "none"] = "peak"
    mean: tuple[Finite, ...] = ()
    std: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> LogMel:
        if not self.fmin < self.fmax <= self.rate / 2:
            raise ValueError("fmin < fmax <= rate / 2")
        if not self.frame <= min(self.n_fft, self.length):
            raise ValueError("frame <= n_fft, and frame <= length")
        if {len(self.mean), len(self.std)} not in ({0}, {self.mels}):
            raise ValueError("mean and std have one value for each mel, or none")
        if not (self.filters > 0).any(1).all():
            raise ValueError("some mels lie between two frequencies: fewer mels, or a larger n_fft")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(frames, mels)."""
        return 1 + (self.length - self.frame) // self.hop, self.mels

    @cached_property
    def filters(self) -> NDArray[np.float32]:
        """H (mels, n_fft / 2 + 1): triangles whose feet are the neighbours' tops."""
        top = 2595 * math.log10(1 + self.fmax / 700)
        foot = 2595 * math.log10(1 + self.fmin / 700)
        edges = 700 * (10 ** (np.linspace(foot, top, self.mels + 2) / 2595) - 1)
        low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        f = np.arange(self.n_fft // 2 + 1) * self.rate / self.n_fft
        triangles = np.minimum((f - low) / (mid - low), (high - f) / (high - mid))
        return np.maximum(triangles, 0).astype(np.float32)

    def features(self, wave: Any) -> Tensor:
        """(frames, mels) float32 of one recording (samples,), int16 or floats from -1 to 1.

        Raises InvalidInput for what is not one.
        """
        x = self._fitted_in(_samples(wave))
        frames = x.unfold(0, self.frame, self.hop) * torch.hann_window(self.frame, periodic=True)
        power = torch.fft.rfft(frames, self.n_fft).abs() ** 2
        logs = (power @ torch.from_numpy(self.filters).T).clamp(min=self.floor).log()
        if self.mean:
            logs = (logs - torch.tensor(self.mean)) / torch.tensor(self.std)
        return logs

    def fitted(self, dataset: Labelled) -> LogMel:
        """The same, normalising by mean and deviation of each feature over a dataset of `spoken`.

        Compute them from the recordings that are trained on, and no others.  Raises InvalidInput
        for features of another shape, of no recordings, or that are normalised already.
        """
        if self.mean or not len(dataset):
            raise InvalidInput(
                "normalised features say nothing about mean and std" if self.mean
                else "there are no recordings to compute mean and std from"
            )  # fmt: skip
        x = np.stack([dataset.image(i)[:, :, 0] for i in range(len(dataset))]).astype(np.float64)
        if x.shape[1:] != self.shape:
            raise InvalidInput(f"the features have shape {x.shape[1:]}, not {self.shape}")
        mean, std = x.mean((0, 1)), np.maximum(x.std((0, 1)), 1e-6)
        return self.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(std.tolist())})

    def _fitted_in(self, x: Tensor) -> Tensor:
        """(length,): the middle of x, or x in the middle, at the level that is wanted."""
        cut = max(0, len(x) - self.length) // 2
        x = x[cut : cut + self.length]
        if self.level == "peak":
            x = x / x.abs().max().clamp(min=1e-12)
        left = (self.length - len(x)) // 2
        return torch.nn.functional.pad(x, (left, self.length - len(x) - left))


def spoken(path: str | os.PathLike[str], config: LogMel) -> Labelled:
    """The recordings of an ``.npz`` as features, with words as classes and speakers as groups.

    Each array is one recording (samples,), int16 or floats from -1 to 1, at `config.rate`, and is
    called WORD_SPEAKER_NUMBER.  Item i is (frames, mels, 1) float32; `Preprocess` of that size with
    mean 0 and std 1 leaves it as it is.

    Raises InvalidInput for a file that is none of this.
    """
    if not os.path.isfile(path):
        raise InvalidInput(f"{str(path)!r} is not a file", hint=f"paths count from {Path.cwd()}")
    names, features = [], []
    try:
        _small_enough(path)
        with np.load(path, allow_pickle=False) as found:
            for name in sorted(found.files):
                _parts(name, path)
                names.append(name)
                features.append(_one(found[name], name, config))
    except InvalidInput:
        raise
    except Exception as error:  # not a zip, cut off, pickled, too large
        raise InvalidInput(
            f"{path} is not an .npz of recordings that can be read",
            why=f"{type(error).__name__}: {error}",
        ) from None
    if not names:
        raise InvalidInput(f"{path} has no recordings", hint="np.savez(path, one_anna_0=samples)")
    words = tuple(sorted({_parts(name, path)[0] for name in names}))
    labels = np.array([words.index(_parts(name, path)[0]) for name in names], np.int64)
    speakers = tuple(_parts(name, path)[1] for name in names)
    source = Recordings(np.stack(features), tuple(names))
    return Labelled(source, np.arange(len(names)), labels, words, speakers)


@dataclass(frozen=True)
class Recordings:
    """A source of features x (n, frames, mels, 1), each with a name."""

    x: NDArray[np.float32] = field(repr=False)
    names: Sequence[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.x)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> NDArray[Any]:
        features: NDArray[Any] = self.x[i]
        features.flags.writeable = False  # of this view
        return features


def _parts(name: str, path: str | os.PathLike[str]) -> tuple[str, str, str]:
    parts = name.rsplit("_", 2)
    if len(parts) != 3 or not all(parts) or not parts[2].isdigit():
        raise InvalidInput(
            f"{path} has an array {name!r}", hint="recordings are called WORD_SPEAKER_NUMBER"
        )
    return parts[0], parts[1], parts[2]


def _one(wave: NDArray[Any], name: str, config: LogMel) -> NDArray[np.float32]:
    try:
        return config.features(wave).numpy()[:, :, None]
    except InvalidInput as error:
        error.what = f"recording {name!r}: {error.what}"
        raise


def _samples(wave: Any) -> Tensor:
    """(samples,) float32 from -1 to 1."""
    if isinstance(wave, Tensor):
        wave = wave.detach().cpu().numpy()
    wave = np.asarray(wave)
    if wave.ndim != 1 or not wave.size or not (wave.dtype == np.int16 or wave.dtype.kind == "f"):
        raise InvalidInput(
            f"a recording has shape {wave.shape} and type {wave.dtype}",
            hint="(samples,), int16 or floats from -1 to 1",
        )
    x = wave.astype(np.float32) / (32768 if wave.dtype == np.int16 else 1)
    if not np.isfinite(x).all():
        raise InvalidInput("a recording has samples that are not finite")
    return torch.from_numpy(x)


def _small_enough(path: str | os.PathLike[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_BYTES:
        raise InvalidInput(
            f"{path} unpacks to {size:,} bytes", why=f"no more than {MAX_BYTES:,} are read"
        )
