"""Three use cases to try federated methods on: sine waves, written characters, spoken words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from modicum.errors import InvalidInput, UsageError
from modicum.federated.populations import (
    CharacterClients,
    Population,
    SineClients,
    SpeakerClients,
)
from modicum.federated.rules import ANNEALED, FEDERATED
from modicum.logmel import LogMel, spoken
from modicum.lower import Loss
from modicum.models import CharacterNet, KeywordNet, SineNet
from modicum.tasks import Labelled, Preprocess, load, take

Paths = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Case:
    """A network, and the population that it is trained and tested on.

    `population(paths, seed)` reads a user's own data: `data` says what `paths` are.  `input` is
    the shape of one sample.  A client learns from `query` samples in a round, one at a time, with
    steps of `rate`; the server's first step is `start` (see `rule_for`).  `local` are patterns of
    the parameters that can stay with the client, `rate_local` is theirs.  A new client learns from
    `shots` samples (of each class), in `tune` passes over them.
    """

    model: Callable[[], nn.Module]
    population: Callable[[Paths, int], Population]
    input: tuple[int, ...]
    loss: Loss
    data: str
    local: tuple[str, ...]
    rate: float
    rate_local: float
    query: int
    start: float
    shots: int
    tune: int


def rule_for(case: Case, name: str, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a federated method on a use case: `values`, and the case's where they are not.

    Where parameters are local, half of the samples reconstruct them, and one of the new client's
    passes does; `start` is for methods without: what is shared then moves less.  Raises UsageError
    for a method that there is not.
    """
    if name not in FEDERATED:
        raise UsageError(f"no federated method is called {name!r}", hint=", ".join(FEDERATED))
    defaults = FEDERATED[name].model_fields
    fields: dict[str, Any] = {"rate": case.rate, "query": case.query, "tune": case.tune}
    if defaults["support"].get_default():
        half = case.query // 2
        fields |= {"local": case.local, "rate_local": case.rate_local, "support": half}
        fields |= {"query": half, "reconstruct": 1, "tune": max(1, case.tune - 1)}
    elif defaults["outer"].get_default() == ANNEALED:
        fields["outer"] = {"start": case.start, "end": 0.0}
    return fields | dict(values or {})


def sines(paths: Paths = (), seed: int = 0) -> SineClients:
    """1,000 clients and 100 newcomers with a wave each; needs no data."""
    if paths:
        raise UsageError("the sine waves are computed and need no data")
    return SineClients(1000, 100, seed)


def characters(paths: Paths, seed: int = 0, newcomers: int | Sequence[str] = 3) -> CharacterClients:
    """5-way tasks of 28x28 characters, a client for each alphabet and quarter turn.

    `paths` are folders or zips of images ALPHABET/CHARACTER/.._DRAWER.png, as Omniglot's.
    """
    return CharacterClients(
        omniglot(paths),
        Preprocess(size=28, mean=(0.0,), std=(1.0,)),
        newcomers=newcomers,
        turned=True,
        seed=seed,
    )


def words(paths: Paths, seed: int = 0, newcomers: int | Sequence[str] = 2) -> SpeakerClients:
    """Spoken words as log-mels (1, 32, 20), a client for each speaker.

    `paths` is one ``.npz`` of recordings at 8 kHz: see `logmel.spoken`.  The features are
    normalised with constants from the speakers that are not newcomers.
    """
    if len(paths) != 1:
        raise UsageError(f"spoken words are one .npz, {len(paths)} paths are given")
    config = LogMel()
    preprocess = Preprocess(size=config.shape, mean=(0.0,), std=(1.0,))
    raw = spoken(paths[0], config)
    drawn = SpeakerClients(raw, preprocess, newcomers, seed)
    seen = np.isin(np.array(raw.group), drawn.speakers[: drawn.clients])
    normalised = spoken(paths[0], config.fitted(raw.subset(seen)))
    return SpeakerClients(normalised, preprocess, drawn.speakers[drawn.clients :])


# What is local is what learned best of head, first layers, last block and biases: the head, where
# labels or amplitudes are each client's own; the biases, where all clients share the labels.
CASES: dict[str, Case] = {
    "sines": Case(
        SineNet, sines, (1,), "mse", "none: they are computed",
        local=("layers.4.*",), rate=0.005, rate_local=0.005, query=32, start=0.3, shots=10, tune=8,
    ),
    "characters": Case(
        CharacterNet, characters, (1, 28, 28), "cross_entropy",
        "folders or zips of ALPHABET/CHARACTER/.._DRAWER.png",
        local=("head.*",), rate=0.02, rate_local=0.02, query=80, start=0.3, shots=5, tune=4,
    ),
    "words": Case(
        KeywordNet, words, (1, 32, 20), "cross_entropy",
        "an .npz with an array of 8 kHz samples for each recording, WORD_SPEAKER_NUMBER",
        local=("*.bias",), rate=0.02, rate_local=0.02, query=32, start=1.0, shots=5, tune=4,
    ),
}  # fmt: skip


def omniglot(paths: Paths, size: int = 28) -> Labelled:
    """Characters of one or more sets, ink 1 on 0, with drawers as groups, small enough to keep.

    A character that several sets have is taken from the first.  Raises InvalidInput.
    """
    if not paths:
        raise UsageError("characters need data: folders or zips of ALPHABET/CHARACTER/IMAGE")
    sets = [load(path, class_level=2, group=r"_(\d+)\.[A-Za-z]+$") for path in paths]
    names = sorted({name for found in sets for name in found.classes})
    if any("/" not in name for name in names):
        raise InvalidInput(f"{paths[0]} has no alphabets", hint="ALPHABET/CHARACTER/IMAGE")
    pixels: list[NDArray[np.float32]] = []
    labels: list[int] = []
    groups: list[str] = []
    for k, name in enumerate(names):
        of = next(found.of_classes([name]) for found in sets if name in found.classes)
        x, _ = take(of, Preprocess(size=size, mean=(0.0,), std=(1.0,)), np.arange(len(of)))
        pixels.append(1 - x.transpose(0, 2, 3, 1))
        labels += [k] * len(of)
        groups += of.group or ()
    found = load((np.concatenate(pixels), np.array(labels)), classes=names)
    return Labelled(found.source, found.index, found.labels, tuple(names), tuple(groups))
