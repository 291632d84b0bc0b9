"""Splits: disjoint, the same everywhere, and what they were asked to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import Labelled, load, split, split_classes


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


def dataset(labels, group=None, names=None) -> Labelled:
    labels = np.asarray(labels)
    names = names or [f"{k}.png" for k in range(len(labels))]
    classes = tuple(f"c{k}" for k in range(int(labels.max()) + 1))
    return Labelled(Named(names), np.arange(len(labels)), labels, classes, group)


PER_CLASS = st.lists(st.integers(10, 40), min_size=1, max_size=5)
FRACTIONS = st.sampled_from([(0.5, 0.5), (0.8, 0.2), (0.6, 0.2, 0.2), (0.1, 0.3), (0.25, None)])


@given(PER_CLASS, FRACTIONS, st.integers(0, 5))
def test_a_stratified_split_is_disjoint_and_divides_each_class(sizes, fractions, seed):
    d = dataset(np.repeat(np.arange(len(sizes)), sizes))
    parts = split(d, fractions, seed=seed)
    taken = [name for part in parts for name in part.names]
    assert len(taken) == len(set(taken)) <= len(d)
    if None in fractions or sum(fractions) == 1:
        assert len(taken) == len(d)
    given_ = [f for f in fractions if f is not None]
    for part, fraction in zip(parts, [*given_, 1 - sum(given_)], strict=False):
        assert (np.abs(part.counts - fraction * d.counts) <= 1).all()


@given(PER_CLASS, st.permutations(range(200)), st.integers(0, 3), st.booleans())
def test_the_order_of_the_files_does_not_matter(sizes, shuffled, seed, stratified):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    d = dataset(labels)
    order = np.array([i for i in shuffled if i < len(d)])
    for a, b in zip(
        split(d, (0.7, 0.3), seed=seed, stratified=stratified),
        split(d.subset(order), (0.7, 0.3), seed=seed, stratified=stratified),
        strict=True,
    ):
        assert sorted(a.names) == sorted(b.names)


@given(st.lists(st.integers(0, 9), min_size=60, max_size=90), st.integers(0, 3), st.booleans())
def test_no_group_lies_in_two_parts(groups, seed, stratified):
    labels = np.arange(len(groups)) % 2
    d = dataset(labels, tuple(f"g{g}" for g in groups))
    try:
        parts = split(d, (0.6, 0.4), seed=seed, stratified=stratified, by_group=True)
    except InvalidInput:  # a group so large, or without a class, that a part lacks something
        return
    sets = [set(part.group) for part in parts]
    assert not sets[0] & sets[1]
    assert sum(map(len, parts)) == len(d)


def test_this_split_is_the_same_for_ever():
    one, two = split(dataset([0] * 6 + [1] * 6), (0.5, 0.5), seed=1)
    assert one.names == ("0.png", "2.png", "5.png", "6.png", "7.png", "8.png")
    assert len(two) == 6


def test_seeds_give_different_splits():
    d = dataset([0] * 50)
    assert split(d, (0.5,), seed=0)[0].names != split(d, (0.5,), seed=1)[0].names


def test_counts_are_per_class_or_in_all():
    d = dataset([0] * 10 + [1] * 20)
    assert [p.counts.tolist() for p in split(d, (3, 4))] == [[3, 3], [4, 4]]
    assert [p.counts.tolist() for p in split(d, (3, None))] == [[3, 3], [7, 17]]
    assert [len(p) for p in split(d, (3, 4), stratified=False)] == [3, 4]


def test_adding_images_moves_few_others():
    labels = [0] * 1000
    before = set(split(dataset(labels), (0.8, 0.2))[1].names)
    after = set(split(dataset([0] * 1010), (0.8, 0.2))[1].names)
    assert len(before - after) <= 10


def test_drawers_are_divided_over_all_characters():
    labels = np.repeat(np.arange(5), 20)
    d = dataset(labels, tuple(f"{k % 20:02}" for k in range(100)))
    train, test = split(d, (15, 5), by_group=True)
    assert len(set(train.group)) == 15 and len(set(test.group)) == 5
    assert test.counts.tolist() == [5] * 5
    assert [len(p) for p in split(d, (0.75, 0.25), by_group=True)] == [75, 25]


def test_groups_within_classes_are_divided_class_by_class():
    d = dataset([0] * 8 + [1] * 8, tuple(f"{k // 2}" for k in range(16)))
    assert [p.counts.tolist() for p in split(d, (0.75, 0.25), by_group=True)] == [[6, 6], [2, 2]]


def test_an_image_that_is_there_twice_stays_in_one_part():
    d = dataset([0] * 10).subset(np.r_[np.arange(10), np.arange(10)])
    one, two = split(d, (0.5, 0.5))
    assert len(one) == len(two) == 10 and not set(one.names) & set(two.names)


@pytest.mark.parametrize(
    "parts",
    [(), (0.5, 0.6), (0.5, 1), (-1,), (0,), (0.0,), (None, None), ("a",), (True,), (float("nan"),)],
)
def test_parts_that_make_no_sense_are_refused(parts):
    with pytest.raises(UsageError, match="cannot split into"):
        split(dataset([0] * 10), parts)


def test_what_cannot_be_met_is_refused_by_name():
    d = dataset([0] * 10 + [1] * 3)
    with pytest.raises(InvalidInput, match=r"class 'c1' has 3 images, 4 are asked for"):
        split(d, (4,))
    with pytest.raises(InvalidInput, match=r"part 1 of the split has no image of class 'c1'"):
        split(d, (0.9, 0.1))
    with pytest.raises(InvalidInput, match="part 1 of the split has no images"):
        split(dataset([0] * 3), (0.9, 0.1), stratified=False)
    with pytest.raises(UsageError, match="needs a dataset with groups"):
        split(d, (0.5,), by_group=True)
    one_group = dataset([0] * 10, ("g",) * 10)
    with pytest.raises(InvalidInput, match="part 1 of the split has no images"):
        split(one_group, (0.5, 0.5), by_group=True)


@pytest.mark.slow
@pytest.mark.needs_shared("data/omniglot_small1.zip")
def test_unseen_drawers_of_omniglot(shared):
    d = load(shared("data/omniglot_small1.zip"), class_level=2, group=r"_(\d+)\.png$")
    train, test = split(d, (15, 5), by_group=True)
    assert not set(train.group) & set(test.group)
    assert (train.counts == 15).all() and (test.counts == 5).all()


@given(st.integers(2, 12), st.data(), st.integers(0, 3))
def test_whole_classes_are_held_back(classes, data, seed):
    held = data.draw(st.integers(1, classes - 1))
    d = dataset(np.arange(3 * classes) % classes)
    others, back = split_classes(d, held, seed=seed)
    assert len(back.classes) == held and len(back) == 3 * held
    assert sorted(others.classes + back.classes) == sorted(d.classes)
    assert sorted(others.names + back.names) == sorted(d.names)
    for part in (others, back):
        assert set(part.labels) == set(range(len(part.classes)))
        for name, label in zip(part.names, part.labels, strict=True):
            assert d.classes[d.labels[d.names.index(name)]] == part.classes[label]
    again = split_classes(dataset((np.arange(3 * classes) % classes)[::-1].copy()), held, seed=seed)
    assert set(again[1].classes) == set(back.classes)


@pytest.mark.parametrize("held", [0, 3, -1])
def test_no_classes_or_all_cannot_be_held_back(held):
    with pytest.raises(UsageError, match="cannot be held back"):
        split_classes(dataset([0, 1, 2]), held)


def test_some_classes_of_a_dataset_are_numbered_as_they_are_named():
    d = dataset([0, 1, 2, 0, 1, 2], group=tuple("abcdef"))
    part = d.of_classes(("c2", "c0"))
    assert part.classes == ("c2", "c0")
    assert part.labels.tolist() == [1, 0, 1, 0] and part.group == tuple("acdf")
    assert d.of_classes(()).classes == () and len(d.of_classes(())) == 0
    with pytest.raises(InvalidInput, match="no class 'c7'"):
        d.of_classes(("c0", "c7"))
