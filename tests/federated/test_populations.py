"""Populations: disjoint streams, newcomers that share nothing, the same samples for a generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import InvalidInput, UsageError
from modicum.federated.populations import (
    CharacterClients,
    PartitionClients,
    SineClients,
    SpeakerClients,
)
from modicum.tasks import Labelled, Preprocess, by_class, by_dirichlet

AS_IS = Preprocess(size=2, mean=(0.0,), std=(1.0,))


class Numbered:
    """Items of 2x2 pixels: its number, its class, its group, and 0, so that samples say whose."""

    def __init__(self, labels, groups):
        self.rows = list(zip(range(len(labels)), labels, groups, strict=True))

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        return f"item{i}"

    def read(self, i):
        return np.array([*self.rows[i], 0], np.float32).reshape(2, 2, 1)


def alphabets(characters=(6, 7, 8), drawers=10) -> Labelled:
    """Alphabets a, b, .. of so many characters, each by all drawers."""
    names = [f"{'abcdef'[a]}/{c:02}" for a, n in enumerate(characters) for c in range(n)]
    labels = np.repeat(np.arange(len(names)), drawers)
    drawer = np.tile(np.arange(drawers), len(names))
    source = Numbered(labels, drawer)
    group = tuple(f"{g:02}" for g in drawer)
    return Labelled(source, np.arange(len(labels)), labels, tuple(names), group)


def speakers(count=5, words=4, each=6) -> Labelled:
    """So many speakers who say all words."""
    labels = np.tile(np.repeat(np.arange(words), each), count)
    speaker = np.repeat(np.arange(count), words * each)
    group = tuple("vwxyz"[s] for s in speaker)
    names = tuple(f"word{k}" for k in range(words))
    return Labelled(Numbered(labels, speaker), np.arange(len(labels)), labels, names, group)


def populations():
    return {
        "sines": SineClients(5, 3, seed=1),
        "characters": CharacterClients(alphabets(), AS_IS, ways=3, newcomers=1),
        "turned": CharacterClients(alphabets(), AS_IS, ways=3, newcomers=1, turned=True),
        "speakers": SpeakerClients(speakers(), AS_IS, newcomers=2),
        "dirichlet": PartitionClients(
            (parts := by_dirichlet(speakers(), 5, 1.0, least=16))[:3], parts[3:], AS_IS
        ),
    }


ALL = tuple(populations())


def item(sample):
    """The number of an item, however it is turned: the rest are below it, or it is 0."""
    return float(sample[0].max())


def drawn(sample):
    """(item, class, group) of an upright sample."""
    return tuple(int(v) for v in sample[0].ravel()[:3])


@pytest.mark.parametrize("name", ALL)
def test_support_and_query_are_disjoint_and_as_many_as_asked_for(name):
    population = populations()[name]
    for client in range(population.clients):
        support, query = (
            list(s) for s in population.streams(client, 5, 8, np.random.default_rng(client))
        )
        assert len(support) == 5 and len(query) == 8
        keys = [s[0].tobytes() for s in (*support, *query)]
        assert len(set(keys)) == 13


@pytest.mark.parametrize("name", ALL)
def test_samples_are_as_a_network_takes_them(name):
    population = populations()[name]
    few, tests = population.newcomer(0, 2, 4, np.random.default_rng(0))
    for x, target in (*few, *tests, *population.streams(0, 0, 3, np.random.default_rng(0))[1]):
        assert x.dtype == np.float32 and x.flags.c_contiguous
        if population.loss == "mse":
            assert x.shape == target.shape == (1,) and target.dtype == np.float32
        else:
            assert x.shape == (1, 2, 2) and type(target) is int


@pytest.mark.parametrize("name", ALL)
def test_a_generator_makes_the_same_samples_in_whatever_order_they_are_read(name):
    def read(query_first):
        support, query = populations()[name].streams(1, 4, 6, np.random.default_rng(3))
        if query_first:
            later, first = list(query), list(support)
        else:
            first, later = list(support), list(query)
        return [(x.tobytes(), np.asarray(y).tobytes()) for x, y in (*first, *later)]

    assert read(False) == read(True)
    few = [populations()[name].newcomer(0, 2, 4, np.random.default_rng(5)) for _ in range(2)]
    assert [x.tobytes() for x, _ in few[0][0]] == [x.tobytes() for x, _ in few[1][0]]


@pytest.mark.parametrize("name", ALL)
def test_another_draw_makes_other_samples(name):
    rng = np.random.default_rng(3)
    one, other = ([x.tobytes() for x, _ in populations()[name].streams(1, 0, 8, rng)[1]]
                  for _ in range(2))  # fmt: skip
    assert one != other


@pytest.mark.parametrize("name", ["characters", "turned", "speakers", "dirichlet"])
def test_newcomers_share_no_item_with_the_clients(name):
    population = populations()[name]
    rng = np.random.default_rng(0)
    seen = {
        item(s)
        for client in range(population.clients)
        for _ in range(20)
        for s in population.streams(client, 0, 8, rng)[1]
    }
    new = {
        item(s)
        for which in range(population.newcomers)
        for _ in range(20)
        for side in population.newcomer(which, 2, 4, rng)
        for s in side
    }
    assert seen and new and not seen & new


def test_newcomers_have_other_alphabets_speakers_and_waves():
    population = CharacterClients(alphabets((6, 7, 8)), AS_IS, ways=3, newcomers=["b"])
    assert population.alphabets == ("a", "c", "b")
    few, tests = population.newcomer(0, 2, 6, np.random.default_rng(0))
    assert {drawn(s)[1] for s in (*few, *tests)} <= set(range(6, 13))

    population = SpeakerClients(speakers(), AS_IS, newcomers=["w", "x"])
    assert population.speakers == ("v", "y", "z", "w", "x")
    few, tests = population.newcomer(1, 2, 6, np.random.default_rng(0))
    assert {drawn(s)[2] for s in (*few, *tests)} == {2}

    population = SineClients(50, 50)
    assert len({population.wave(i) for i in range(100)}) == 100


@given(st.integers(0, 1 << 40), st.integers(0, 10**9))
def test_waves_are_in_the_range_of_the_paper_and_belong_to_seed_and_client(seed, i):
    a, b = SineClients(1, 1, seed).wave(i)
    assert 0.1 <= a <= 5 and 0 <= b <= np.pi
    assert (a, b) == SineClients(10**9, 5, seed).wave(i)


def test_points_lie_on_the_wave_of_the_client():
    population = SineClients(5, 5)
    a, b = population.wave(2)
    support, query = population.streams(2, 20, 200, np.random.default_rng(0))
    x, y = (np.concatenate(v) for v in zip(*support, *query, strict=True))
    np.testing.assert_allclose(y, a * np.sin(x.astype(np.float64) + b), atol=1e-5)
    assert -5 <= x.min() < -4.5 and 4.5 < x.max() <= 5


@given(st.integers(0, 18), st.integers(1, 12), st.integers(0, 100))
def test_a_task_of_characters_has_its_ways_evenly_and_drawers_on_one_side_only(s, q, seed):
    population = CharacterClients(alphabets(), AS_IS, ways=3, newcomers=1)
    support, query = (list(t) for t in population.streams(0, s, q, np.random.default_rng(seed)))
    for side in (support, query):
        counts = np.bincount([label for _, label in side], minlength=3)
        assert len(counts) == 3 and counts.max() - counts.min() <= 1
    character = {(label, drawn((x,))[1]) for x, label in (*support, *query)}
    assert len(character) == len({label for label, _ in character})
    one, other = ({drawn(x)[2] for x in side} for side in (support, query))
    assert not one & other


def test_a_quarter_turn_is_a_client_of_its_own():
    population = CharacterClients(alphabets(), AS_IS, ways=3, newcomers=1, turned=True)
    assert population.clients == 8 and population.newcomers == 1
    upright, turned = (
        [x for x, _ in population.streams(client, 0, 4, np.random.default_rng(0))[1]]
        for client in (4, 5)
    )
    for a, b in zip(upright, turned, strict=True):
        np.testing.assert_array_equal(np.rot90(a[0]), b[0])


def test_a_class_that_some_drawers_lack_is_left_out_where_others_are_enough():
    d = alphabets((4, 4))
    d = d.subset(~((d.labels == 0) & (np.arange(len(d)) % 10 > 1)))  # 2 images of character 0
    population = CharacterClients(d, AS_IS, ways=3, newcomers=["b"])
    for seed in range(10):
        _, query = population.streams(0, 9, 15, np.random.default_rng(seed))
        assert {drawn(s)[1] for s in query} == {1, 2, 3}


def test_shots_are_per_class_and_tests_are_others():
    population = SpeakerClients(speakers(), AS_IS)
    few, tests = population.newcomer(0, 2, 10, np.random.default_rng(0))
    assert np.bincount([y for _, y in few]).tolist() == [2, 2, 2, 2] and len(tests) == 10
    assert not {item(s) for s in few} & {item(s) for s in tests}
    few, tests = CharacterClients(alphabets(), AS_IS, 3).newcomer(
        0, 4, 10, np.random.default_rng(0)
    )
    assert np.bincount([y for _, y in few]).tolist() == [4, 4, 4] and len(tests) == 10


def test_a_new_client_is_tested_on_classes_that_it_has_enough_of():
    parts = by_class(speakers(), 4, 2)
    population = PartitionClients(parts[:2], parts[2:], AS_IS)
    few, tests = population.newcomer(0, 3, 8, np.random.default_rng(0))
    classes = set(np.flatnonzero(parts[2].counts))
    assert {y for _, y in few} == classes >= {y for _, y in tests} and len(few) == 6


def rng():
    return np.random.default_rng(0)


def partition(a, b):
    return PartitionClients(a, b, AS_IS)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SineClients(0, 1), UsageError, "0 clients"),
        (lambda: SineClients(2, 1).streams(2, 1, 1, rng()), UsageError, "no client 2"),
        (lambda: SineClients(2, 1).newcomer(-1, 1, 1, rng()), UsageError, "no newcomer -1"),
        (lambda: SpeakerClients(speakers(), AS_IS, 5), UsageError, "0 clients"),
        (lambda: SpeakerClients(speakers(), AS_IS, 0), UsageError, "0 newcomers"),
        (lambda: SpeakerClients(speakers(), AS_IS, ["q"]), UsageError, "no speaker 'q'"),
        (
            lambda: SpeakerClients(speakers(), AS_IS).streams(0, 12, 13, rng()),
            InvalidInput,
            "24 samples, 12 + 13",
        ),
        (
            lambda: SpeakerClients(speakers(), AS_IS).newcomer(0, 2, 17, rng()),
            InvalidInput,
            "16 samples beside 2 of each class",
        ),
        (
            lambda: SpeakerClients(speakers(), AS_IS).newcomer(0, 6, 1, rng()),
            InvalidInput,
            "fewer shots",
        ),
        (lambda: partition([speakers()], [speakers().subset([])]), InvalidInput, "no items"),
        (lambda: partition([d := speakers()], [d.subset([3])]), InvalidInput, "share 'item3'"),
        (lambda: partition([speakers()], [alphabets()]), InvalidInput, "other classes"),
        (lambda: CharacterClients(alphabets(), AS_IS, ways=1), UsageError, "1 ways"),
        (lambda: CharacterClients(alphabets(), AS_IS, 3, ["z"]), UsageError, "no alphabet 'z'"),
        (
            lambda: CharacterClients(
                alphabets(), Preprocess(size=(2, 3), mean=(0.0,), std=(1.0,)), 3, turned=True
            ),
            UsageError,
            "square",
        ),
        (
            lambda: CharacterClients(alphabets(), AS_IS, 9, 1).streams(0, 1, 1, rng()),
            InvalidInput,
            "fewer than 9 characters",
        ),
        (
            lambda: CharacterClients(alphabets(), AS_IS, 3, 1).streams(0, 16, 15, rng()),
            InvalidInput,
            "6 + 5 images of other drawers",
        ),
    ],
)
def test_what_cannot_be_drawn_says_why(make, error, says):
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)
