"""Partitions between clients: every item once, the same everywhere, as unequal as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import Labelled, by_class, by_dirichlet, by_group, load


class Named:
    """Items that have names and nothing else."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def read(self, i):
        return np.zeros((1, 1, 1), np.uint8)


def dataset(sizes, group=None, order=None) -> Labelled:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = np.arange(len(labels)) if order is None else order
    names = [f"{k}.png" for k in order]
    classes = tuple(f"c{k}" for k in range(len(sizes)))
    return Labelled(Named(names), np.arange(len(labels)), labels[order], classes, group)


def names_of(parts):
    return [sorted(part.names) for part in parts]


def skew(parts):
    """Mean total variation between the labels of a client and those of all: 0 where all alike."""
    counts = np.array([part.counts for part in parts], float)
    overall = counts.sum(0) / counts.sum()
    return np.mean([0.5 * np.abs(c / c.sum() - overall).sum() for c in counts])


SIZES = st.lists(st.integers(20, 60), min_size=2, max_size=6)


@given(SIZES, st.integers(1, 8), st.sampled_from([0.01, 0.3, 10.0]), st.integers(0, 1 << 40))
def test_a_dirichlet_partition_has_every_item_once(sizes, clients, alpha, seed):
    d = dataset(sizes)
    parts = by_dirichlet(d, clients, alpha, seed=seed, least=0)
    assert len(parts) == clients
    assert sorted(name for part in parts for name in part.names) == sorted(d.names)


@given(SIZES, st.integers(1, 8), st.data())
def test_a_partition_by_class_has_every_item_once_and_so_many_classes_each(sizes, clients, data):
    d = dataset(sizes)
    least = -(-len(sizes) // clients)
    each = data.draw(st.integers(least, len(sizes)))
    parts = by_class(d, clients, each, seed=data.draw(st.integers(0, 9)))
    assert sorted(name for part in parts for name in part.names) == sorted(d.names)
    assert all((part.counts > 0).sum() == each for part in parts)
    owners = sum((part.counts > 0).astype(int) for part in parts)
    assert owners.max() - owners.min() <= 1


@given(SIZES, st.permutations(range(360)), st.integers(0, 3))
def test_the_order_of_the_files_does_not_matter(sizes, shuffled, seed):
    order = np.array([i for i in shuffled if i < sum(sizes)])
    one, other = dataset(sizes), dataset(sizes, order=order)
    for divide in (
        lambda d: by_dirichlet(d, 4, 0.5, seed=seed, least=0),
        lambda d: by_class(d, 6, 2, seed=seed),
    ):
        assert names_of(divide(one)) == names_of(divide(other))


def test_a_seed_makes_the_same_parts_again_and_another_seed_others():
    d = dataset([50] * 5)
    for divide in (
        lambda seed: by_dirichlet(d, 5, 0.5, seed=seed),
        lambda seed: by_class(d, 5, 2, seed=seed),
    ):
        assert names_of(divide(3)) == names_of(divide(3)) != names_of(divide(4))


def test_a_partition_stays_the_same_over_versions():
    parts = by_dirichlet(dataset([30, 30, 30]), 4, 0.5, seed=7)
    assert [part.counts.tolist() for part in parts] == [
        [1, 0, 1],
        [13, 13, 27],
        [3, 1, 2],
        [13, 16, 0],
    ]


def test_clients_differ_more_the_smaller_alpha_is():
    d = dataset([100] * 10)
    mean = [
        np.mean([skew(by_dirichlet(d, 10, alpha, seed=seed)) for seed in range(5)])
        for alpha in (100.0, 1.0, 0.2)
    ]
    assert mean[0] < 0.1 < mean[1] < mean[2]
    assert mean[2] > 0.5


def test_a_tiny_alpha_gives_a_class_to_one_client():
    parts = by_dirichlet(dataset([40] * 4), 3, 1e-4, least=0)
    owners = sum((part.counts > 0).astype(int) for part in parts)
    assert (owners == 1).all()


def test_shares_follow_the_dirichlet_distribution():
    """The mean of a share is 1 / n, its variance (1/n) (1 - 1/n) / (n alpha + 1)."""
    n, alpha = 4, 0.7
    d = dataset([1000] * 200)
    counts = np.array([part.counts for part in by_dirichlet(d, n, alpha)]) / 1000
    assert counts.mean() == pytest.approx(1 / n)
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    assert counts.var() == pytest.approx(variance, rel=0.15)


def test_every_client_gets_the_least_that_was_asked_for():
    d = dataset([100] * 4)
    for seed in range(5):
        parts = by_dirichlet(d, 8, 0.3, seed=seed, least=10)
        assert min(map(len, parts)) >= 10


def test_groups_become_clients_in_the_order_of_their_names():
    groups = tuple("cab"[k % 3] for k in range(60))
    d = dataset([20] * 3, group=groups)
    parts = by_group(d)
    assert [set(part.group) for part in parts] == [{"a"}, {"b"}, {"c"}]
    assert sum(map(len, parts)) == 60 and all(part.classes == d.classes for part in parts)


def test_groups_can_be_given():
    d = dataset([20] * 4)
    folder = ["first" if d.classes[k] in ("c0", "c1") else "second" for k in d.labels]
    first, second = by_group(d, folder)
    assert set(first.labels) == {0, 1} and set(second.labels) == {2, 3}
    assert set(second.group) == {"second"}


@pytest.mark.parametrize(
    ("divide", "error", "says"),
    [
        (lambda d: by_group(d), UsageError, "no groups"),
        (lambda d: by_group(d, ["a"]), InvalidInput, "40 items but 1 groups"),
        (lambda d: by_dirichlet(d, 0, 1.0), UsageError, "clients=0"),
        (lambda d: by_dirichlet(d, 2, 0.0), UsageError, "alpha=0"),
        (lambda d: by_dirichlet(d, 2, float("nan")), UsageError, "alpha=nan"),
        (lambda d: by_dirichlet(d, 2, 1.0, least=-1), UsageError, "least=-1"),
        (lambda d: by_dirichlet(d, 41, 1.0), InvalidInput, "40 items are too few for 41"),
        (lambda d: by_dirichlet(d, 10, 1.0, least=5), InvalidInput, "at least 5"),
        (lambda d: by_dirichlet(d, 8, 0.01, least=4), InvalidInput, "larger alpha"),
        (lambda d: by_class(d, 2, 3), UsageError, "2 classes"),
        (lambda d: by_class(d, 0, 1), UsageError, "0 clients"),
        (lambda d: by_class(d, 1, 1), UsageError, "without a client"),
        (lambda d: by_class(d, 30, 2), InvalidInput, "20 items for 30 clients"),
    ],
)
def test_what_cannot_be_divided_says_why(divide, error, says):
    with pytest.raises(error) as raised:
        divide(dataset([20, 20]))
    assert says in str(raised.value)


@pytest.mark.needs_shared("data/omniglot_small1.zip")
def test_the_alphabets_of_omniglot_become_clients(shared):
    d = load(shared("data/omniglot_small1.zip"), class_level=2)
    alphabets = [d.classes[k].rpartition("/")[0] for k in d.labels]
    parts = by_group(d, alphabets)
    assert [part.group[0] for part in parts] == sorted(set(alphabets))
    assert sum(map(len, parts)) == len(d) == 2720
