"""Labelled images from outside: load, check, split, make batches and few-shot tasks.  Torch-free.

The public names, and nothing else, are for other modules::

    load(source, *, class_level=1, classes=None, group=None, ignore=(), shrink=None,
         keep_bytes=1 << 30, layout=None) -> Labelled
    check(dataset, progress=None) -> None          # decodes every image, lists the broken ones
    same_classes(train, test) -> None

    Labelled: .labels (n,) int64   .classes tuple[str, ...]   .group tuple[str, ...] | None
              .names tuple[str, ...]   .counts (classes,) int64   len()   .image(i) (h, w, c)
              .subset(indices) -> Labelled   .of_classes(names) -> Labelled

    split(dataset, parts, *, seed=0, stratified=True, by_group=False) -> tuple[Labelled, ...]
    split_classes(dataset, held, *, seed=0) -> tuple[others, held]      # whole classes

    by_group(dataset, groups=None) -> tuple[Labelled, ...]              # one part per client
    by_dirichlet(dataset, clients, alpha, *, seed=0, least=1) -> tuple[Labelled, ...]
    by_class(dataset, clients, classes, *, seed=0) -> tuple[Labelled, ...]

    Preprocess(size, mean, std, resize=None, interpolation="bilinear")   .shape == (c, h, w)
    Augment(crop="resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), pad=4, flip=True)

    batches(dataset, preprocess, batch, *, seed=0, epoch=0, augment=None, shuffle=True,
            drop_last=False, start=0) -> Iterator[tuple[x, y]]          # one epoch
    steps(dataset, batch, *, drop_last=False) -> int
    Stream(dataset, preprocess, batch, *, seed=0, epochs=None, augment=None, shuffle=True,
           drop_last=False, at=Position())          # many epochs; .at is where to go on
    Position(epoch=0, step=0)                                           # plain data, JSON
    take(dataset, preprocess, indices, *, seed=0, epoch=0, augment=None) -> tuple[x, y]
    arrays(dataset, preprocess) -> tuple[x, y]                          # whole, in order

    FixedEpisodes(ways=5, shots=5, queries=10)          ways may be a range (low, high)
    VariousEpisodes(ways=(5, 50), support_limit=500, class_limit=100, queries=10, log_weights=...)
    EpisodeRule = FixedEpisodes | VariousEpisodes
    draw_task(dataset, rule, *, seed, index, query=None, apart=False) -> Task
    tasks(dataset, rule, count, *, seed=0, start=0, query=None, apart=False) -> Iterator[Task]
    given_task(support, query=None) -> Task             # a user's own two sets
    Task: .classes tuple[str, ...]   .support, .query Labelled   .ways   .shots (ways,) int64
    PseudoQuery(probability=0.9, colour=True, translate=0.125)
    pseudo_query(x, config, *, seed, step, first=0) -> x                # augmented support images

x is float32 (b, c, h, w), y is int64 (b,): numpy arrays, which `torch.from_numpy` wraps without
a copy.  Whatever is broken in what comes from outside raises `modicum.errors.InvalidInput`.
"""

from __future__ import annotations

from modicum.tasks.batching import (
    Augment,
    Position,
    Preprocess,
    Stream,
    arrays,
    batches,
    steps,
    take,
)
from modicum.tasks.clients import by_class, by_dirichlet, by_group
from modicum.tasks.episodes import (
    EpisodeRule,
    FixedEpisodes,
    Task,
    VariousEpisodes,
    draw_task,
    given_task,
    tasks,
)
from modicum.tasks.labelled import Labelled, check, same_classes
from modicum.tasks.pseudo import PseudoQuery, pseudo_query
from modicum.tasks.reading import load
from modicum.tasks.splitting import split, split_classes

__all__ = [
    "Augment",
    "EpisodeRule",
    "FixedEpisodes",
    "Labelled",
    "Position",
    "Preprocess",
    "PseudoQuery",
    "Stream",
    "Task",
    "VariousEpisodes",
    "arrays",
    "batches",
    "by_class",
    "by_dirichlet",
    "by_group",
    "check",
    "draw_task",
    "given_task",
    "load",
    "pseudo_query",
    "same_classes",
    "split",
    "split_classes",
    "steps",
    "take",
    "tasks",
]
