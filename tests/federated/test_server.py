from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modicum import InvalidInput
from modicum.errors import UsageError
from modicum.federated.codec import Message, decode, encode
from modicum.federated.rules import ANNEALED, FedAvg, FedRecon, Outer, TinyMetaFed, TinyReptile
from modicum.federated.server import LIMIT, Server

MODEL = bytes(16)
SIZE = 6
START = np.linspace(-1, 1, SIZE).astype(np.float32)


def update(server, delta, **changed) -> bytes:
    given = {"kind": "delta", "model": MODEL, "round": server.done + 1, "size": SIZE} | changed
    values = np.asarray(delta, np.float32)
    return encode(Message(values=values, **given))


def shown(blob, kept=None):
    message = decode(blob, model=MODEL, size=SIZE, kind="weights")
    return message.values if message.where is None else message.laid_over(kept)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.05, 1.5))
def test_the_outer_step_is_its_closed_form(n, seed, eps):
    """theta + eps * mean(delta), float64 sums rounded once; eps = 1 is FedAvg's mean."""
    rng = np.random.default_rng(seed)
    deltas = rng.normal(size=(n, SIZE)).astype(np.float32)
    server = Server(FedAvg(clients=n, outer=Outer(start=eps, end=eps), weighting="clients"),
                    MODEL, START, 3)  # fmt: skip
    server.open(range(n))
    for client, delta in enumerate(deltas):
        assert server.receive(client, update(server, delta), 8) is None
    log = server.close()
    want = (START + eps * deltas.astype(np.float64).sum(0) / n).astype(np.float32)
    assert np.array_equal(server.theta, want)
    assert log.used == list(range(n)) and not log.failed


def test_samples_weigh_the_mean():
    server = Server(FedAvg(clients=2, weighting="samples"), MODEL, START, 1)
    server.open([0, 1])
    server.receive(0, update(server, np.ones(SIZE)), 30)
    server.receive(1, update(server, np.zeros(SIZE)), 10)
    server.close()
    assert np.allclose(server.theta, START + 0.75)


def test_the_step_size_is_annealed():
    linear = [ANNEALED.step_size(t, 4) for t in range(1, 5)]
    assert linear == [1.0, 0.75, 0.5, 0.25]
    cosine = Outer(start=1, end=0.2, schedule="cosine")
    steps = [cosine.step_size(t, 8) for t in range(1, 9)]
    assert steps[0] == 1 and steps == sorted(steps, reverse=True) and 0.2 < steps[-1] < 0.3
    assert cosine.step_size(5, 8) == pytest.approx(0.6)


def test_the_same_clients_are_chosen_whenever_it_is_asked():
    a, b = (Server(FedAvg(clients=3), MODEL, START, 9, seed) for seed in (1, 1))
    picks = [a.choose(t, range(50)) for t in range(1, 9)]
    assert picks == [b.choose(t, list(range(50))[::-1]) for t in range(1, 9)]
    assert len({tuple(p) for p in picks}) > 1 and all(len(set(p)) == 3 for p in picks)
    assert Server(FedAvg(clients=3), MODEL, START, 9, 2).choose(1, range(50)) != picks[0]
    assert a.choose(1, [4, 7]) == [4, 7]


BAD = {
    "cut short": lambda s: update(s, np.ones(SIZE))[:20],
    "damaged": lambda s: update(s, np.ones(SIZE))[:-1] + b"\0",
    "of another model": lambda s: update(s, np.ones(SIZE), model=bytes([9] * 16)),
    "of another size": lambda s: update(s, np.ones(SIZE - 1), size=SIZE - 1),
    "of another round": lambda s: update(s, np.ones(SIZE), round=7),
    "holds weights": lambda s: update(s, np.ones(SIZE), kind="weights"),
    "out of range": lambda s: update(s, np.full(SIZE, 2 * LIMIT)),
    "too large": lambda s: bytes(10_000),
    "not a message": lambda s: b"x" * 50,
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_update_is_refused_and_the_round_goes_on(why):
    server = Server(FedAvg(clients=2, weighting="clients"), MODEL, START, 2)
    server.open([3, 5])
    assert why in server.receive(3, BAD[why](server), 8)
    assert server.receive(5, update(server, np.ones(SIZE)), 8) is None
    log = server.close()
    assert np.allclose(server.theta, START + 1)
    assert log.used == [5] and why in log.failed[3]


@pytest.mark.parametrize("samples", [0, -1, 33, 10**12])
def test_a_client_cannot_claim_other_numbers_of_samples(samples):
    server = Server(FedAvg(clients=1, query=32), MODEL, START, 1)
    server.open([0])
    assert "samples" in server.receive(0, update(server, np.ones(SIZE)), samples)
    server.close()
    assert np.array_equal(server.theta, START)


def test_an_update_counts_once_and_only_of_those_asked():
    server = Server(TinyReptile(), MODEL, START, 2)
    server.open([4])
    blob = update(server, np.ones(SIZE))
    assert "not asked" in server.receive(5, blob, 32)
    assert server.receive(4, blob, 32) is None
    assert "second" in server.receive(4, blob, 32)
    server.close()
    assert np.allclose(server.theta, START + 1)
    server.open([4])
    assert "another round" in server.receive(4, blob, 32), "replayed"
    assert server.close().used == []


def test_a_client_that_does_not_answer_is_named():
    server = Server(FedAvg(clients=3), MODEL, START, 1)
    server.open([0, 1, 2])
    server.receive(1, update(server, np.ones(SIZE)), 8)
    server.fail(2, "an error: the battery")
    log = server.close()
    assert log.failed == {0: "no answer", 2: "an error: the battery"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2 * LIMIT])
def test_weights_in_the_open_are_held_to_the_same_limits(bad):
    server = Server(TinyReptile(), MODEL, START, 2)
    server.open([0])
    assert "finite or out of range" in server.receive_weights(0, START + np.float32(bad), 8)
    assert "another model" in server.receive_weights(0, START[:-1], 8)
    assert "another model" in server.receive_weights(0, START.astype(np.float64), 8)
    assert server.receive_weights(0, START + 1, 8) is None
    assert server.close().bytes_up == 4 * 4 * SIZE
    assert np.allclose(server.theta, START + 1)


def test_a_large_change_is_scaled_down_to_the_clip():
    server = Server(TinyReptile(clip=0.5, outer=Outer()), MODEL, START, 1)
    server.open([0])
    server.receive(0, update(server, np.full(SIZE, 100.0)), 8)
    log = server.close()
    assert np.linalg.norm(server.theta - START) == pytest.approx(0.5, rel=1e-5)
    assert log.clipped == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 99)), max_size=25))
def test_what_changed_is_all_that_a_client_needs(rounds):
    """Whatever fails on the way, a client that keeps its weights has the server's."""
    rule = TinyMetaFed(local=("x",), top=0.3, outer=Outer())
    server = Server(rule, MODEL, START, 99)
    kept: dict[int, np.ndarray] = {}
    for client, answers, seed in rounds:
        rng = np.random.default_rng(seed)
        blob = server.open([client])[client]
        weights = shown(blob, kept.get(client))
        assert np.array_equal(weights, server.theta)
        where = np.sort(rng.choice(SIZE, 2, replace=False))
        if answers:
            kept[client] = weights
            delta = rng.normal(size=2)
            assert server.receive(client, update(server, delta, where=where), 16) is None
        server.close()


def test_less_comes_down_where_little_changed():
    size = 1000
    server = Server(TinyMetaFed(local=("x",), outer=Outer()), MODEL, np.zeros(size, np.float32), 9)
    lengths = []
    for _ in range(3):
        lengths.append(len(server.open([0])[0]))
        where = np.arange(20)
        part = Message("delta", MODEL, server.done + 1, size, np.ones(20, np.float32), where)
        server.receive(0, encode(part), 16)
        server.close()
    assert lengths[0] == 4036 and lengths[1:] == [36 + 6 * 20] * 2


def test_the_largest_moves_alone_come_down_and_the_rest_later():
    rule = TinyMetaFed(local=("x",), outer=Outer(), downlink_top=0.5)
    server = Server(rule, MODEL, START, 9)
    server.open([0])
    delta = np.array([1, 2, 3, 40, 50, 60], np.float32)
    server.receive(0, update(server, delta), 16)
    server.close()
    assert np.allclose(shown(server.open([1])[1]), START + delta * [0, 0, 0, 1, 1, 1])
    server.close()
    assert np.allclose(shown(server.open([1])[1]), START + delta)
    server.close()


def test_a_saved_server_goes_on_to_the_same_bits(tmp_path):
    rule = FedAvg(clients=2, outer=ANNEALED)

    def play(server, until):
        while server.done < until:
            rng = np.random.default_rng(server.done)
            asked = server.choose(server.done + 1, range(9))
            server.open(asked)
            for client in asked:
                server.receive(client, update(server, rng.normal(size=SIZE)), 8)
            server.close()

    whole = Server(rule, MODEL, START, 6, 3)
    play(whole, 6)
    first = Server(rule, MODEL, START, 6, 3)
    play(first, 2)
    first.save(tmp_path / "s.npz")
    play(first, 3)  # lost with the crash
    second = Server(rule, MODEL, np.zeros(SIZE, np.float32), 6, 3)
    second.restore(tmp_path / "s.npz")
    play(second, 6)
    assert second.theta.tobytes() == whole.theta.tobytes()


def test_a_state_of_another_federation_or_a_damaged_one_changes_nothing(tmp_path):
    path = tmp_path / "s.npz"
    Server(FedAvg(), MODEL, START, 6, 3).save(path)
    others = {
        "rule": Server(FedAvg(rate=0.5), MODEL, START, 6, 3),
        "rounds": Server(FedAvg(), MODEL, START, 7, 3),
        "seed": Server(FedAvg(), MODEL, START, 6, 4),
        "model": Server(FedAvg(), bytes([1] * 16), START, 6, 3),
    }
    for what, server in others.items():
        with pytest.raises(InvalidInput, match=f"another {what}"):
            server.restore(path)
        assert server.done == 0 and np.array_equal(server.theta, START)
    raw = path.read_bytes()
    mine = Server(FedAvg(), MODEL, START, 6, 3)
    for broken in (raw[: len(raw) // 2], b"", b"PK\3\4" + raw[4:100]):
        path.write_bytes(broken)
        with pytest.raises(InvalidInput, match="not a saved server"):
            mine.restore(path)
    with pytest.raises(InvalidInput, match="not a saved server"):
        mine.restore(tmp_path / "none.npz")


def test_rules_that_contradict_themselves_are_refused():
    for wrong in (
        {"local": ("a",), "support": 0},
        {"support": 8},
        {"reconstruct": 1},
        {"query": 10, "batch": 4},
        {"downlink_top": 0.5},
        {"top": 0},
        {"local": ("a",), "support": 256},
        {"rate": float("nan")},
        {"clip": -1},
    ):
        with pytest.raises(ValidationError):
            TinyReptile(**wrong)
    local = {"local": ("x",)}
    for rule, more in ((FedAvg, {}), (TinyReptile, {}), (TinyMetaFed, local), (FedRecon, local)):
        for wrong in (
            {"clients": 0}, {"query": 0}, {"passes": 0}, {"batch": 0}, {"tune": -1}, {"top": 0},
            {"top": 2}, {"support": -1}, {"reconstruct": -1},
        ):  # fmt: skip
            with pytest.raises(ValidationError, match=next(iter(wrong))):
                rule(**more, **wrong)
    with pytest.raises(UsageError, match="rounds"):
        Server(TinyReptile(), MODEL, START, 0)
    with pytest.raises(InvalidInput, match="finite"):
        Server(TinyReptile(), MODEL, START * np.nan, 1)
