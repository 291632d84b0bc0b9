"""The app on Flower's engines, and under its wrappers, does what it does in one process."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from modicum.errors import InvalidInput, UsageError
from modicum.federated.app import task
from modicum.federated.app.task import Settings, open_site, rule_of, run, strategy_of
from modicum.federated.cases import CASES
from modicum.federated.client_app import client_app
from modicum.federated.flower import Array, ArrayRecord, Error, Message
from modicum.federated.grid import LocalGrid
from modicum.federated.simulate import simulate
from modicum.federated.strategy import Federate

tomllib = pytest.importorskip("tomllib", reason="Flower needs Python 3.11")
CACHE = tempfile.TemporaryDirectory(prefix="modicum-")


def settings(**more: object) -> Settings:
    rule = '{"kind": "tinymetafed", "clients": 3}'
    small = {"rule": rule, "rounds": 3, "clients": 8, "newcomers": 2, "judge_every": 3, "tests": 10}
    return Settings.model_validate({**small, "cache": CACHE.name, **more})


def in_one_process(chosen: Settings, grid: type[LocalGrid] = LocalGrid) -> Federate:
    strategy = strategy_of(chosen)
    nodes = chosen.clients + chosen.newcomers
    run(chosen, strategy, grid(client_app(open_site), nodes, chosen.config()))
    return strategy


@pytest.mark.slow
def test_the_simulation_engine_agrees_with_one_process_and_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = settings()
    expected = in_one_process(chosen)
    monkeypatch.setenv("MODICUM_TEST", str(tmp_path))
    seen: set[int] = set()
    found = simulate(chosen, cpus=2, on_round=lambda log: seen.update(inheriting(tmp_path)))
    assert len(seen) > 2
    assert [r.used for r in found.rounds] == [r.used for r in expected.rounds]
    assert [len(r.used) for r in found.rounds] == [3, 3, 3]
    assert [r.bytes_up for r in found.rounds] == [r.bytes_up for r in expected.rounds]
    np.testing.assert_allclose(found.server.theta, expected.server.theta, atol=1e-6)
    assert found.judgements[-1].after == pytest.approx(expected.judgements[-1].after, abs=1e-6)
    assert not inheriting(tmp_path)


PRIVATE = {
    "rule": '{"kind": "reptile", "clients": 4, "batch": 1, "outer": {"start": 1, "end": 1}}',
    "judge_every": 0, "dp_clip": 0.05,
}  # fmt: skip


def test_with_differential_privacy_noise_arrives_and_training_goes_on() -> None:
    np.random.seed(0)
    clipped = in_one_process(settings(**PRIVATE))
    noisy = in_one_process(settings(**PRIVATE, dp_noise=0.5))
    assert [len(r.used) for r in noisy.rounds] == [4, 4, 4]
    start = strategy_of(settings(**PRIVATE)).server.theta
    moved = np.linalg.norm(clipped.server.theta - start)
    assert 0 < moved <= 3 * 0.05 * 1.001  # three rounds, each at most the clipping norm
    noise = noisy.server.theta - clipped.server.theta
    expected = np.sqrt(3) * 2 * 0.5 * 0.05 / 4
    assert np.std(noise) == pytest.approx(expected, rel=0.15)
    assert len(noisy.rounds) == 3 and all(r.loss is not None for r in noisy.rounds)


def test_a_client_that_fails_under_differential_privacy_is_left_out_and_said_why() -> None:
    strategy = in_one_process(settings(**PRIVATE), Faulty)
    for log in strategy.rounds:
        assert sorted([*log.used, *log.failed]) == log.asked
        assert all("refused" in why or "an error" in why for why in log.failed.values())
    assert any(log.failed for log in strategy.rounds) and any(log.used for log in strategy.rounds)
    assert np.isfinite(strategy.server.theta).all()


class Faulty(LocalGrid):
    """Clients 0 to 3 answer an error, a second array, another model, what is not finite."""

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        client = message.metadata.dst_node_id - 1
        if message.metadata.message_type != "train" or client > 3:
            return reply
        assert reply is not None
        if client == 0:
            return Message(Error(code=2, reason="no power"), reply_to=message)
        shared = reply.content.array_records["shared"]["shared"].numpy()
        content = [
            {"shared": shared, "more": shared}, {"shared": shared[1:]}, {"shared": shared * np.inf}
        ][client - 1]  # fmt: skip
        reply.content["shared"] = ArrayRecord({k: Array(v) for k, v in content.items()})
        return reply


def test_differential_privacy_refuses_what_it_does_not_cover() -> None:
    for rule, why in (
        ("tinymetafed", "sent whole"),
        ("fedavg", "known beforehand"),  # weighs by samples, as clients claim them
        ('{"kind": "reptile", "batch": 1, "outer": {"start": 2}}', "up to 1"),
    ):
        chosen = settings(**{**PRIVATE, "rule": rule})
        with pytest.raises(UsageError, match=why):
            in_one_process(chosen)
    with pytest.raises(UsageError, match="dp-clip"):
        in_one_process(settings(judge_every=0, dp_noise=1.0))


@pytest.mark.slow
def test_a_client_on_a_board_learns_what_one_in_pytorch_does() -> None:
    few = {"rule": "tinymetafed", "clients": 2, "newcomers": 0, "judge_every": 0, "rounds": 2}
    here = in_one_process(settings(**few))
    there = in_one_process(settings(**few, learner="board", link="host"))
    assert [r.used for r in there.rounds] == [r.used for r in here.rounds]
    assert all(len(r.used) == 1 for r in there.rounds)
    np.testing.assert_allclose(there.server.theta, here.server.theta, atol=1e-5)


def test_a_board_needs_a_link() -> None:
    found = in_one_process(settings(learner="board", newcomers=0, judge_every=0, rounds=1))
    assert all("without a link" in why for why in found.rounds[0].failed.values())
    assert len(found.rounds[0].failed) == 3


def test_the_app_folder_says_what_the_settings_say() -> None:
    file = Path(task.__file__).with_name("pyproject.toml")
    said = tomllib.loads(file.read_text())["tool"]["flwr"]["app"]["config"]
    assert said == Settings().config()
    assert Settings.of(said) == Settings()


def test_a_node_says_what_it_is_and_nothing_else() -> None:
    node = {"partition-id": 3, "learner": "native", "rounds": 7}
    assert Settings.of({"rounds": 5}, node) == Settings(rounds=5, learner="native")
    with pytest.raises(UsageError, match="run config"):
        Settings.of({"learner": "magic"})
    with pytest.raises(UsageError, match="no case"):
        strategy_of(Settings(case="chess"))


def test_what_a_rule_does_not_say_is_the_cases() -> None:
    case = CASES["sines"]
    rule = rule_of('{"kind": "tinymetafed", "top": 0.5}', case)
    assert (rule.top, rule.local, rule.rate) == (0.5, case.local, case.rate)
    assert rule_of("reptile", case).local == ()
    for wrong in (
        "magic",
        '{"kind": ["reptile"]}',
        '{"top": 2}',
        "{",
        '{"kind": "reptile", "x": 1}',
    ):
        with pytest.raises(UsageError):
            rule_of(wrong, case)


def test_a_cache_is_made_once_and_only_for_the_code_that_made_it(tmp_path: Path) -> None:
    chosen = settings(cache=str(tmp_path))
    first = strategy_of(chosen)
    made = sorted(tmp_path.glob("plan-*"))
    stamps = [file.stat().st_mtime_ns for file in made]
    assert len(made) == 2
    assert strategy_of(chosen).server.model == first.server.model
    assert [file.stat().st_mtime_ns for file in made] == stamps
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cache"):
        strategy_of(settings(cache=str(tmp_path / "file")))


def inheriting(value: Path) -> set[int]:
    """Processes that have MODICUM_TEST=value from the one that set it, whose children they are, or
    were; it is not among them."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile
            if f"MODICUM_TEST={value}".encode() in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
    return found
