"""Few-shot tasks: what the rule asks for, disjoint, and the same for every method."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import (
    EpisodeRule,
    FixedEpisodes,
    Labelled,
    PseudoQuery,
    VariousEpisodes,
    draw_task,
    draws,
    given_task,
    load,
    pseudo_query,
    split,
    tasks,
)

SMALL = FixedEpisodes(ways=2, shots=1, queries=1)


class Numbered:
    """Items that are their number and nothing else."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def name(self, i):
        return f"{i}.png"

    def read(self, i):
        return np.full((1, 1, 1), i, np.uint8)


def dataset(sizes, group=None, order=None) -> Labelled:
    """Classes of these sizes, a, b, ..; `group` maps (class, number in it) to a name."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    classes = tuple("abcdefghijklmnopqrstuvwxyz"[k] for k in range(len(sizes)))
    names = None
    if group is not None:
        names = tuple(group(c, i) for c, size in enumerate(sizes) for i in range(size))
    made = Labelled(Numbered(len(labels)), np.arange(len(labels)), labels, classes, names)
    return made if order is None else made.subset(order)


def check_labels(d, task, query=None):
    """Each image of a task has the class that it has in the set it is from."""
    for part, whole in ((task.support, d), (task.query, d if query is None else query)):
        assert part.source is whole.source and part.classes == task.classes
        label = {int(i): whole.classes[k] for i, k in zip(whole.index, whole.labels, strict=True)}
        assert [part.classes[k] for k in part.labels] == [label[int(i)] for i in part.index]
        assert len(set(part.index.tolist())) == len(part)


def same(one, other) -> bool:
    return one.classes == other.classes and all(
        a.index.tolist() == b.index.tolist() and a.labels.tolist() == b.labels.tolist()
        for a, b in ((one.support, other.support), (one.query, other.query))
    )


# ---- fixed ways and shots ------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=8),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**70),
    st.integers(0, 1000),
)
def test_a_fixed_task_has_what_was_asked_for_or_says_why_not(
    sizes, ways, shots, queries, seed, index
):
    d = dataset(sizes)
    rule = FixedEpisodes(ways=ways, shots=shots, queries=queries)
    large = [c for c, n in zip(d.classes, sizes, strict=True) if n >= shots + queries]
    if len(large) < ways:
        with pytest.raises(InvalidInput, match=f"a task of {ways} ways needs as many classes"):
            draw_task(d, rule, seed=seed, index=index)
        return
    task = draw_task(d, rule, seed=seed, index=index)
    assert task.ways == len(set(task.classes)) == ways and set(task.classes) <= set(large)
    assert task.shots.tolist() == [shots] * ways and task.query.counts.tolist() == [queries] * ways
    assert not set(task.support.index.tolist()) & set(task.query.index.tolist())
    check_labels(d, task)


def test_a_range_of_ways_is_drawn_evenly_up_to_the_classes_there_are():
    rule = FixedEpisodes(ways=(3, 20), shots=1, queries=1)
    ways = np.array([t.ways for t in tasks(dataset([4] * 8), rule, 1200)])
    found = np.bincount(ways, minlength=9)[3:]
    assert found.sum() == 1200 and len(found) == 6
    assert ((found - 200) ** 2 / 200).sum() < 20.5  # chi squared with 5 degrees: p = 0.001


def test_classes_and_images_are_drawn_evenly():
    d = dataset([6] * 10)
    classes, support, query = np.zeros(10), np.zeros(60), np.zeros(60)
    first = np.zeros(10)
    for t in tasks(d, FixedEpisodes(ways=4, shots=2, queries=1), 3000):
        drawn = [d.classes.index(c) for c in t.classes]
        classes[drawn] += 1
        first[drawn[0]] += 1
        support[t.support.index] += 1
        query[t.query.index] += 1
    # Standard deviations of binomial counts; five of them, over 140 counts.
    for counts, share in ((classes, 0.4), (first, 0.1), (support, 0.4 / 3), (query, 0.4 / 6)):
        assert np.abs(counts - 3000 * share).max() < 5 * math.sqrt(3000 * share * (1 - share))


# ---- various ways and shots ----------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=26),
    st.sampled_from([(5, 50), (2, 4), (3, 30)]),
    st.sampled_from([500, 60]),
    st.sampled_from([100, 7]),
    st.integers(0, 50),
)
def test_a_various_task_keeps_within_all_caps(sizes, ways, support_limit, class_limit, index):
    d = dataset(sizes)
    rule = VariousEpisodes(ways=ways, support_limit=support_limit, class_limit=class_limit)
    usable = [n for n in sizes if n >= 2]
    if len(usable) < 2:
        with pytest.raises(InvalidInput, match="a task of 2 ways needs as many classes"):
            draw_task(d, rule, seed=0, index=index)
        return
    task = draw_task(d, rule, seed=0, index=index)
    check_labels(d, task)
    n = np.array([sizes[d.classes.index(c)] for c in task.classes])
    assert min(ways[0], len(usable)) <= task.ways <= min(ways[1], len(usable))
    queries = min(10, n.min() // 2)
    assert task.query.counts.tolist() == [queries] * task.ways
    assert (task.shots >= 1).all() and (task.shots + queries <= n).all()
    contributions = np.minimum(class_limit, n - queries).sum()
    assert task.ways <= len(task.support) <= min(support_limit, contributions)
    assert not set(task.support.index.tolist()) & set(task.query.index.tolist())


def reference(sizes, rng):
    """Meta-Dataset, section 3.2: ways, queries of each class, and (size, shots) of each class."""
    sizes = np.array(sizes)
    drawn = rng.permutation(len(sizes))[: rng.integers(5, min(50, len(sizes)) + 1)]
    n = sizes[drawn]
    q = min(10, int(np.floor(0.5 * n.min())))
    beta = 1 - rng.random()
    size = 0
    for one in n:
        size += int(np.ceil(beta * min(100, one - q)))
    size = min(size, 500)
    pull = [math.exp(rng.uniform(math.log(0.5), math.log(2))) * one for one in n]
    shots = [
        min(int(p / sum(pull) * (size - len(n))) + 1, one - q)
        for p, one in zip(pull, n, strict=True)
    ]
    return len(n), q, list(zip(n.tolist(), shots, strict=True))


UNEVEN = [4, 15, 30, 30, 60, 90, 150, 150, 300, 600, 1000, 2000, *[45] * 12]


@pytest.mark.parametrize("sizes", [[60] * 26, UNEVEN, [120] * 7, [20] * 20])
def test_various_tasks_are_distributed_as_in_the_paper(sizes):
    d, rng, count = dataset(sizes), np.random.default_rng(1), 600
    found, wanted = [], []
    for t in tasks(d, VariousEpisodes(), count, seed=3):
        n = [sizes[d.classes.index(c)] for c in t.classes]
        found.append((t.ways, t.query.counts[0], list(zip(n, t.shots.tolist(), strict=True))))
    wanted = [reference(sizes, rng) for _ in range(count)]

    def statistics(drawn):
        rows = []
        for ways, q, classes in drawn:
            n, k = np.array(classes).T
            relative = k / n / (k / n).mean()
            rows.append((ways, q, k.sum(), k.mean(), k.max(), k.std(), relative.std(), k[0]))
        return np.array(rows, np.float64)

    a, b = statistics(found), statistics(wanted)
    error = np.sqrt((a.var(0) + b.var(0)) / count)
    assert (np.abs(a.mean(0) - b.mean(0)) <= 4 * error).all()
    for i in (0, 2, 3):  # ways, support size, shots: the whole distribution (Kolmogorov, Smirnov)
        points = np.unique(np.r_[a[:, i], b[:, i]])
        below = [np.searchsorted(np.sort(x[:, i]), points, side="right") / count for x in (a, b)]
        assert np.abs(below[0] - below[1]).max() < 1.95 * math.sqrt(2 / count)  # p = 0.001


def test_log_weights_that_are_equal_share_the_support_by_class_size():
    rule = VariousEpisodes(ways=(2, 2), log_weights=(0.0, 0.0), class_limit=60, support_limit=90)
    for t in tasks(dataset([100, 300]), rule, 20):
        share = {"a": 0.25, "b": 0.75}
        if len(t.support) > 10:
            for c, k in zip(t.classes, t.shots, strict=True):
                assert abs(k - 1 - share[c] * (len(t.support) - 2)) <= 1.5


# ---- the same tasks for everyone -----------------------------------------------------------------


@given(st.sampled_from([FixedEpisodes(shots=2, queries=3), VariousEpisodes()]), st.integers(0, 9))
def test_a_task_does_not_depend_on_those_drawn_before_it(rule, seed):
    d = dataset([7, 30, 9, 14, 11, 80])
    many = list(tasks(d, rule, 12, seed=seed))
    for k in (11, 3, 0):
        assert same(many[k], draw_task(d, rule, seed=seed, index=k))
    assert all(map(same, many[5:], tasks(d, rule, 7, seed=seed, start=5)))
    assert all(map(same, many, tasks(d, rule, 12, seed=np.int64(seed))))
    assert not any(map(same, many, many[1:]))
    assert not any(map(same, many, tasks(d, rule, 12, seed=seed + 1)))


def test_these_tasks_are_the_same_for_ever():
    d = dataset([12, 40, 7, 19, 25, 33, 8], group=lambda c, i: f"g{i % 4}")
    one, other = split(d, (0.5, 0.5))
    digest = hashlib.sha256()
    for rule in (FixedEpisodes(ways=(2, 4), shots=2, queries=3), VariousEpisodes()):
        for sets in ({}, {"apart": True}, {"query": other}):
            for t in tasks(one if "query" in sets else d, rule, 5, seed=4, **sets):
                shown = (t.classes, t.support.index.tolist(), t.query.index.tolist())
                digest.update(repr(shown).encode())
    assert digest.hexdigest()[:16] == "8429e3a8c923255a"
    t = draw_task(d, FixedEpisodes(ways=3, shots=2, queries=1), seed=1, index=2)
    assert (t.classes, t.support.index.tolist(), t.query.index.tolist()) == (
        ("a", "c", "g"),
        [8, 10, 57, 56, 141, 136],
        [0, 52, 137],
    )


# ---- queries from elsewhere, and groups apart ----------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=3, max_size=6),
    st.integers(0, 30),
)
def test_queries_from_another_set_take_nothing_from_the_support(sizes, index):
    d, other = (dataset([pair[k] for pair in sizes]) for k in (0, 1))
    usable = {c for c, (n, m) in zip(d.classes, sizes, strict=True) if n >= 4 and m >= 3}
    rule = FixedEpisodes(ways=2, shots=4, queries=3)
    if len(usable) < 2:
        with pytest.raises(InvalidInput, match="in the query set"):
            draw_task(d, rule, seed=0, index=index, query=other)
    else:
        task = draw_task(d, rule, seed=0, index=index, query=other)
        assert set(task.classes) <= usable
        assert task.shots.tolist() == [4, 4] and task.query.counts.tolist() == [3, 3]
        check_labels(d, task, other)
    usable = {c for c, (n, m) in zip(d.classes, sizes, strict=True) if n and m}
    if len(usable) >= 2:
        task = draw_task(d, VariousEpisodes(), seed=0, index=index, query=other)
        check_labels(d, task, other)
        assert set(task.classes) <= usable and task.ways >= min(5, len(usable))
        most = min(m for _, m in (sizes[d.classes.index(c)] for c in task.classes))
        assert task.query.counts.tolist() == [most] * task.ways
        assert (task.shots <= [sizes[d.classes.index(c)][0] for c in task.classes]).all()


def test_one_sample_per_class_is_enough_where_queries_come_from_elsewhere():
    one, other = dataset([1] * 5), dataset([10] * 5)
    task = draw_task(one, FixedEpisodes(shots=1), seed=0, index=0, query=other)
    assert task.shots.tolist() == [1] * 5 and len(task.query) == 50
    task = draw_task(one, VariousEpisodes(), seed=0, index=0, query=other)
    assert task.shots.tolist() == [1] * 5 and len(task.query) == 50


GROUPS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def check_apart(task):
    for k in range(task.ways):
        sides = [
            {g for g, label in zip(part.group, part.labels, strict=True) if label == k}
            for part in (task.support, task.query)
        ]
        assert all(sides) and not sides[0] & sides[1]


@given(st.lists(GROUPS, min_size=2, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_groups_are_kept_apart_wherever_that_can_be_done(classes, shots, queries):
    def group(c, i):
        return f"g{np.searchsorted(np.cumsum(classes[c]), i, side='right')}"

    d = dataset([sum(groups) for groups in classes], group=group)

    def possible(groups):
        chosen = itertools.product((0, 1), repeat=len(groups))
        taken = [sum(n for n, t in zip(groups, on, strict=True) if t) for on in chosen]
        return any(t >= queries and sum(groups) - t >= shots for t in taken)

    can = {c for c, groups in zip(d.classes, classes, strict=True) if possible(groups)}
    rule = FixedEpisodes(ways=2, shots=shots, queries=queries)
    if len(can) < 2:
        with pytest.raises(InvalidInput, match="of other groups"):
            draw_task(d, rule, seed=0, index=0, apart=True)
        return
    for task in tasks(d, rule, 10, apart=True):
        assert set(task.classes) <= can
        assert task.shots.tolist() == [shots] * 2 and task.query.counts.tolist() == [queries] * 2
        check_apart(task)
        check_labels(d, task)


@given(st.lists(GROUPS, min_size=2, max_size=6), st.integers(0, 100))
def test_various_tasks_with_groups_apart_leave_half_of_the_images_to_the_support(classes, index):
    def group(c, i):
        return f"g{np.searchsorted(np.cumsum(classes[c]), i, side='right')}"

    d = dataset([sum(groups) for groups in classes], group=group)

    def most(groups):
        """Most images in groups that hold at most half of them."""
        chosen = itertools.product((0, 1), repeat=len(groups))
        sums = [sum(n for n, t in zip(groups, on, strict=True) if t) for on in chosen]
        return max(s for s in sums if s <= sum(groups) // 2)

    can = {c: most(groups) for c, groups in zip(d.classes, classes, strict=True)}
    if sum(n > 0 for n in can.values()) < 2:
        with pytest.raises(InvalidInput, match="of other groups"):
            draw_task(d, VariousEpisodes(), seed=0, index=index, apart=True)
        return
    task = draw_task(d, VariousEpisodes(), seed=0, index=index, apart=True)
    check_apart(task)
    check_labels(d, task)
    assert set(task.query.counts.tolist()) == {min(10, *(can[c] for c in task.classes))}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5))
def test_groups_that_two_sets_share_are_kept_apart_wherever_that_can_be_done(groups):
    """Class a has these images of each group in the two sets; class b has enough."""
    sizes = list(zip(*groups, strict=True))

    def of(k):
        def group(c, i):
            return "x" * (k + 1) if c else f"g{np.searchsorted(np.cumsum(sizes[k]), i, 'right')}"

        return dataset([sum(sizes[k]), 9], group=group)

    chosen = list(itertools.product((0, 1), repeat=len(groups)))
    pairs = [
        (
            sum(n for (n, _), t in zip(groups, on, strict=True) if not t),
            sum(m for (_, m), t in zip(groups, on, strict=True) if t),
        )
        for on in chosen
    ]
    rule = FixedEpisodes(ways=2, shots=3, queries=4)
    if not any(n >= 3 and m >= 4 for n, m in pairs):
        with pytest.raises(InvalidInput, match="of other groups"):
            draw_task(of(0), rule, seed=0, index=0, query=of(1), apart=True)
        return
    one, other = of(0), of(1)
    for task in tasks(one, rule, 5, query=other, apart=True):
        check_apart(task)
        check_labels(one, task, other)
        assert task.shots.tolist() == [3, 3] and task.query.counts.tolist() == [4, 4]


def test_a_speaker_is_held_out_of_all_words_at_once():
    d = dataset([50] * 6, group=lambda c, i: f"speaker{i % 5}")
    held = set()
    for task in tasks(d, FixedEpisodes(ways=4, shots=8, queries=10), 60, apart=True):
        assert len(set(task.query.group)) == 1
        assert not set(task.query.group) & set(task.support.group)
        held |= set(task.query.group)
    assert len(held) == 5


# ---- what is refused -----------------------------------------------------------------------------


def test_too_few_classes_are_named_with_what_there_is():
    with pytest.raises(InvalidInput, match=r"needs as many classes; there are 3: 'a', 'b', 'c'"):
        draw_task(dataset([20] * 3), FixedEpisodes(), seed=0, index=0)
    with pytest.raises(InvalidInput) as caught:
        draw_task(dataset([20, 20, 3, 14, 20]), FixedEpisodes(), seed=0, index=0)
    assert "3 of 5 are large enough for 5 shots and 10 queries" in caught.value.what
    assert caught.value.details["why"] == ["'c' has 3 images", "'d' has 14 images"]
    with pytest.raises(InvalidInput) as caught:
        draw_task(dataset([2] * 9), FixedEpisodes(), seed=0, index=0)
    assert caught.value.details["why"][-1] == "and 4 more"


@pytest.mark.parametrize("rule", [SMALL, VariousEpisodes()])
def test_one_class_leaves_nothing_to_tell_apart(rule):
    with pytest.raises(InvalidInput, match="leaves nothing to tell apart"):
        draw_task(dataset([50]), rule, seed=0, index=0)


@pytest.mark.parametrize("rule", [SMALL, VariousEpisodes()])
def test_one_image_per_class_leaves_no_queries(rule):
    with pytest.raises(InvalidInput, match="0 of 6 are large enough"):
        draw_task(dataset([1] * 6), rule, seed=0, index=0)


def test_sets_that_do_not_go_together_are_refused():
    d = dataset([9] * 3, group=lambda c, i: "one")
    with pytest.raises(UsageError, match="apart needs a dataset with groups"):
        draw_task(dataset([9] * 3), SMALL, seed=0, index=0, apart=True)
    with pytest.raises(UsageError, match="apart needs a dataset with groups"):
        tasks(d, SMALL, 1, query=dataset([9] * 3), apart=True)
    with pytest.raises(InvalidInput, match="9 images of 1 groups"):
        draw_task(d, SMALL, seed=0, index=0, apart=True)
    with pytest.raises(InvalidInput, match="classes of the dataset and of the query set differ"):
        draw_task(d, SMALL, seed=0, index=0, query=dataset([9] * 4))
    with pytest.raises(InvalidInput, match="share 2 images"):
        draw_task(d.subset([0, 1, 9]), SMALL, seed=0, index=0, query=d.subset([1, 9, 10]))
    for count, start in ((-1, 0), (1, -1)):
        with pytest.raises(UsageError, match="there are no"):
            tasks(d, SMALL, count, start=start)


def test_an_image_that_is_there_twice_is_on_one_side_only():
    d = dataset([3] * 2)
    twice = d.subset(np.tile(np.arange(6), 4))
    for task in tasks(twice, FixedEpisodes(ways=2, shots=2, queries=1), 20):
        assert len({*task.support.index.tolist(), *task.query.index.tolist()}) == 6
    with pytest.raises(InvalidInput, match="'a' has 3 images"):
        draw_task(twice, FixedEpisodes(ways=2, shots=2, queries=2), seed=0, index=0)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FixedEpisodes, {"ways": 1}),
        (FixedEpisodes, {"ways": (5, 3)}),
        (FixedEpisodes, {"shots": 0}),
        (FixedEpisodes, {"queries": 0}),
        (VariousEpisodes, {"ways": (1, 5)}),
        (VariousEpisodes, {"ways": (6, 5)}),
        (VariousEpisodes, {"support_limit": 49}),
        (VariousEpisodes, {"log_weights": (1.0, 0.0)}),
        (VariousEpisodes, {"log_weights": (0.0, math.inf)}),
        (PseudoQuery, {"probability": 1.5}),
        (PseudoQuery, {"translate": -0.1}),
    ],
)
def test_rules_that_make_no_sense_are_refused(kind, fields):
    with pytest.raises(ValidationError):
        kind(**fields)


@pytest.mark.parametrize(
    "rule", [FixedEpisodes(ways=(2, 7)), VariousEpisodes(queries=3), FixedEpisodes(shots=1)]
)
def test_a_rule_comes_back_from_json(rule):
    assert TypeAdapter(EpisodeRule).validate_json(rule.model_dump_json()) == rule


# ---- a user's own sets ---------------------------------------------------------------------------


def test_given_sets_become_a_task_of_the_classes_in_the_support():
    d = dataset([4, 5, 6, 7])
    support = d.subset([0, 5, 16, 17])  # a, b, d d
    query = d.subset([18, 1, 2, 19])  # d a a d: none of b
    task = given_task(support, query)
    assert task.classes == ("a", "b", "d") and task.ways == 3
    assert task.shots.tolist() == [1, 1, 2] and task.support.labels.tolist() == [0, 1, 2, 2]
    assert task.query.labels.tolist() == [2, 0, 0, 2] and task.query.classes == task.classes
    check_labels(d, task)
    assert len(given_task(support).query) == 0


def test_given_classes_are_found_by_name():
    one = load((np.zeros((2, 4, 4)), [0, 1]), classes=("cat", "dog"))
    other = load((np.zeros((3, 4, 4)), [0, 1, 0]), classes=("dog", "cat"))
    assert given_task(one, other).query.labels.tolist() == [1, 0, 1]


def test_given_sets_that_are_no_task_are_refused():
    d = dataset([4, 5, 6])
    with pytest.raises(InvalidInput, match="nothing to tell apart: the support set has one class"):
        given_task(d.subset([0, 1]), d.subset([2]))
    with pytest.raises(InvalidInput, match="the support set has no images"):
        given_task(d.subset([]))
    with pytest.raises(InvalidInput, match="1 classes that the support set has no image") as caught:
        given_task(d.subset([0, 4]), d.subset([1, 9, 10]))
    assert caught.value.details["why"] == ["'c': 2 query images"]


# ---- pseudo-queries ------------------------------------------------------------------------------


def images(b=6, c=3, h=9, w=12, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.2, (b, c, h, w)).astype(np.float32)


@given(
    st.integers(1, 8), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12),
    st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    st.integers(0, 40),
)  # fmt: skip
def test_pseudo_queries_are_diffaugment_step_by_step(b, c, h, w, probability, colour, move, step):
    x = images(b, c, h, w, step)
    before = x.copy()
    config = PseudoQuery(probability=probability, colour=colour, translate=move)
    found = pseudo_query(x, config, seed=5, step=step)
    assert (x == before).all() and found.shape == x.shape and found.dtype == np.float32
    chance = draws.uniform(5, draws.PSEUDO, step, np.arange(b), 6)
    for one, out, (coin, u, v, s, down, right) in zip(x, found, chance, strict=True):
        if coin >= probability:
            assert (out == one).all()
            continue
        y = one.astype(np.float64)
        if colour:
            y = y + (u - 0.5)
            y = (y - y.mean(0)) * (2 * v) + y.mean(0)
            y = (y - y.mean()) * (s + 0.5) + y.mean()
        most = [int(side * move + 0.5) for side in (h, w)]
        by = [int(p * (2 * m + 1)) - m for p, m in zip((down, right), most, strict=True)]
        wanted = np.zeros_like(y)
        for i, j in itertools.product(range(h), range(w)):
            if 0 <= i - by[0] < h and 0 <= j - by[1] < w:
                wanted[:, i, j] = y[:, i - by[0], j - by[1]]
        assert np.abs(out - wanted).max() < 1e-5


def test_a_pseudo_query_depends_on_seed_step_and_position_only():
    x = np.repeat(images(1), 8, 0)
    config = PseudoQuery(probability=1.0)
    whole = pseudo_query(x, config, seed=1, step=3)
    for k in range(8):
        alone = pseudo_query(x[k : k + 1], config, seed=1, step=3, first=k)
        assert np.abs(alone[0] - whole[k]).max() < 1e-6
        assert k == 0 or np.abs(whole[0] - whole[k]).max() > 0.01
    for other in ({"seed": 2, "step": 3}, {"seed": 1, "step": 4}):
        assert (np.abs(pseudo_query(x, config, **other) - whole).max((1, 2, 3)) > 0.01).all()
    assert (pseudo_query(x, config, seed=1, step=3) == whole).all()


def test_so_many_are_changed_and_shifts_are_even():
    x = np.zeros((2000, 1, 16, 16), np.float32)
    x[:, 0, 8, 8] = 1
    config = PseudoQuery(probability=0.7, colour=False)
    at = np.argwhere(pseudo_query(x, config, seed=0, step=0)[:, 0] == 1)[:, 1:] - 8
    assert len(at) == 2000 and np.abs(at).max() == 2
    moved = (at != 0).any(1).sum()
    share = 0.7 * 24 / 25
    assert abs(moved - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    found = np.array([(at == (i, j)).all(1).sum() for i in range(-2, 3) for j in range(-2, 3)])
    found[12] -= 600  # those left as they are
    assert ((np.delete(found, 12) - 56) ** 2 / 56).sum() < 51  # chi squared, 23 degrees: 0.0007


def test_colours_vary_as_far_as_they_may():
    flat = np.full((4000, 3, 2, 2), 0.2, np.float32)
    config = PseudoQuery(probability=1.0, translate=0.0)
    change = pseudo_query(flat, config, seed=0, step=0)[:, 0, 0, 0] - 0.2
    assert -0.5 <= change.min() < -0.49 and 0.49 < change.max() < 0.5
    assert abs(change.mean()) < 4 * math.sqrt(1 / 12 / 4000)
    grey = np.zeros((4000, 3, 2, 1), np.float32)
    grey[:, :, 0], grey[:, :, 1] = 1, -1
    seen = pseudo_query(grey, config, seed=0, step=0)
    contrast = (seen[:, 0, 0, 0] - seen[:, 0, 1, 0]) / 2
    assert 0.499 < contrast.min() < 0.51 and 1.49 < contrast.max() < 1.501


def test_these_pseudo_queries_are_the_same_for_ever():
    x = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8).repeat(6, 0)
    config = PseudoQuery(probability=0.8, colour=False, translate=0.25)
    seen = pseudo_query(x, config, seed=2, step=1)
    assert seen[:, 0, 3, 4].tolist() == [28.0, 12.0, 26.0, 28.0, 10.0, 28.0]


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4), (2, 0, 4, 4)])
def test_what_are_no_images_is_refused(shape):
    with pytest.raises(UsageError, match="images have shape"):
        pseudo_query(np.zeros(shape), PseudoQuery(), seed=0, step=0)


# ---- real data -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs_shared("data/omniglot_small1.zip")
def test_characters_by_drawers_that_are_not_in_the_support(shared):
    d = load(shared("data/omniglot_small1.zip"), class_level=2, group=r"_(\d+)\.png$")
    for task in tasks(d, FixedEpisodes(ways=20, shots=1, queries=5), 3, apart=True):
        check_apart(task)
        assert len(set(task.query.group)) == 5
        assert not set(task.query.group) & set(task.support.group)
        assert task.support.image(0).shape == (105, 105, 1)
