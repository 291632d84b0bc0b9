from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from federated.lines import LineLearner, Lines, make_net

import modicum as mo
from modicum.board import get as board
from modicum.errors import UsageError
from modicum.federated.client_app import Site, blob_record, client_app
from modicum.federated.codec import Message as Coded
from modicum.federated.codec import decode, encode
from modicum.federated.faults import LIES, FaultyGrid
from modicum.federated.federation import federate, render
from modicum.federated.flower import Array, ArrayRecord, RecordDict, quiet
from modicum.federated.flower import Message as FlowerMessage
from modicum.federated.grid import LocalGrid
from modicum.federated.rules import FedAvg, FedRecon, Reptile, TinyMetaFed, TinyReptile
from modicum.federated.server import Server
from modicum.federated.strategy import Federate, read_history, run_rounds

EXAMPLE = torch.zeros(1, 2)
LOCAL = ("head.*",)
METAFED = TinyMetaFed(
    local=LOCAL, rate=0.05, rate_local=0.1, support=4, query=6, top=0.3, clients=2
)
RULES = {
    "fedavg": FedAvg(rate=0.05, clients=3, query=8, batch=4),
    "reptile": Reptile(rate=0.05, query=8, batch=4),
    "tinyreptile": TinyReptile(rate=0.05, query=8),
    "fedrecon": FedRecon(
        local=LOCAL,
        rate=0.05,
        rate_local=0.1,
        clients=3,
        support=4,
        query=8,
        batch=4,
        reconstruct=1,
    ),
    "tinymetafed": METAFED,
}


class Setup:
    """A federation whose grid a test can reach into."""

    def __init__(
        self, rule, rounds=4, seed=0, folder=None, grid=LocalGrid, population=None, **more
    ):
        quiet()
        population = population or Lines()
        training, deployment = LineLearner(rule), LineLearner(rule, deploys=True)
        self.site = Site(rule, population, training, deployment, 4, 20, 1, seed)
        layout = training.layout
        app = client_app(lambda context: self.site)
        faults = {"layout": layout} if isinstance(grid, partial) else {}
        self.grid = grid(app, 8, **faults)
        server = Server(rule, layout.model, np.zeros(layout.size, np.float32), rounds, seed)
        self.strategy = Federate(server, population.clients, folder=folder, **more)

    def run(self):
        run_rounds(self.strategy, self.grid)
        return self.strategy.server.theta


def play(rule, **more):
    """(weights, the strategy afterwards)."""
    setup = Setup(rule, **more)
    return setup.run(), setup.strategy


def run(rule, **more):
    return federate(make_net(), EXAMPLE, rule, Lines(), learner="torch", shots=4, tests=20, **more)


@pytest.mark.parametrize("name", RULES)
def test_the_same_seed_gives_the_same_bits(name):
    (a, first), (b, second) = (play(RULES[name], judge_every=2, seed=3) for _ in range(2))
    assert a.tobytes() == b.tobytes()
    for what in ("rounds", "judgements"):
        assert [x.as_dict() for x in getattr(first, what)] == [
            x.as_dict() for x in getattr(second, what)
        ]
    assert [j.round for j in first.judgements] == [0, 2, 4]
    assert a.tobytes() != play(RULES[name], seed=4)[0].tobytes()


def test_a_model_is_federated_and_what_it_learned_helps_new_clients(tmp_path):
    rule = TinyMetaFed(
        local=LOCAL, rate=0.05, rate_local=0.05, support=8, query=8, reconstruct=2, tune=2
    )
    made = run(rule, rounds=30, judge_every=30, tasks=2, out=tmp_path / "f", board="nano33ble")
    first, last = made.judgements
    assert last.after < 0.5 * first.after
    text = render(made)
    assert "tinymetafed: 30 rounds, 24 parameters shared, 9 kept by clients" in text
    assert f"RAM           {made.ram:,} bytes" in text and 0 < made.ram < 10_000
    kept = json.loads((tmp_path / "f" / "history.json").read_text())
    assert kept["bytes"] == made.bytes == made.spent(30) > made.spent(3) > 0
    with np.load(tmp_path / "f" / "weights.npz") as weights:
        assert set(weights) == {"body.0.weight", "body.0.bias"}


def test_sending_all_of_the_changes_is_sending_them_dense():
    whole = METAFED.model_copy(update={"top": 1.0})
    almost = METAFED.model_copy(update={"top": 1 - 1e-9})  # by position, every one of them
    (a, first), (b, second) = (play(rule, rounds=5) for rule in (whole, almost))
    assert a.tobytes() == b.tobytes()
    up = [sum(r.bytes_up for r in s.rounds) for s in (first, second)]
    assert up[1] < up[0], "positions and values of what changed, not all values"


def test_what_changed_alone_comes_down_and_nothing_is_different():
    rules = [METAFED.model_copy(update={"downlink": kind}) for kind in ("whole", "changed")]
    (a, first), (b, second) = (play(rule, rounds=12) for rule in rules)
    assert a.tobytes() == b.tobytes()
    down = [sum(r.bytes_down for r in s.rounds) for s in (first, second)]
    assert down[1] < 0.7 * down[0]


class Watched(LocalGrid):
    """Keeps what passes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.passed = []

    def answer(self, message):
        reply = super().answer(message)
        self.passed += [message, reply]
        return reply


@pytest.mark.parametrize("name", RULES)
def test_no_message_has_room_for_a_local_parameter(name):
    """Looked at in Flower's messages, both ways: one array of bytes, which hold shared ones."""
    rule = RULES[name]
    setup = Setup(rule, grid=Watched, judge_every=4)
    theta = setup.run()
    layout = setup.site.training.layout
    shared = LineLearner.IDLE + (2 if rule.local else 3)
    assert layout.size == shared == len(theta)
    seen = 0
    for message in setup.grid.passed:
        records = message.content
        for record in records.array_records.values():
            assert list(record) == ["blob"]
            blob = record["blob"].numpy().tobytes()
            kinds = []
            for kind in ("weights", "delta"):
                try:
                    kinds.append(decode(blob, model=layout.model, size=shared, kind=kind))
                except mo.InvalidInput:
                    continue
            assert len(kinds) == 1
            seen += 1
        for record in [*records.config_records.values(), *records.metric_records.values()]:
            assert all(isinstance(v, int | float) for v in record.values())
            assert len(record) <= 4
    assert seen >= 8
    for context in setup.grid.contexts.values():
        kept = context.state.array_records.get("kept", {})
        assert all(kept[k].numpy().shape == (shared,) for k in kept)


def test_support_and_query_of_a_round_are_different_samples():
    taken = []

    class Spied(Lines):
        def streams(self, *args):
            sides = [list(side) for side in super().streams(*args)]
            taken.append(sides)
            return [iter(side) for side in sides]

    play(METAFED, rounds=3, population=Spied())
    assert len(taken) == 6
    for support, query in taken:
        assert (len(support), len(query)) == (METAFED.support, METAFED.query)
        assert not {x.tobytes() for x, _ in support} & {x.tobytes() for x, _ in query}


# ---- faults -------------------------------------------------------------------------------------


LIAR = 2


def test_failing_and_lying_clients_are_named_and_do_no_harm():
    rule = FedAvg(rate=0.05, clients=4, query=8, batch=4, tune=3)
    setup = Setup(
        rule, rounds=36, judge_every=36, grid=partial(FaultyGrid, share=0.3, liars=(LIAR,))
    )
    setup.run()
    rounds = setup.strategy.rounds
    assert [r.round for r in rounds] == list(range(1, 37))
    lies = {r.round % len(LIES): r.failed[LIAR] for r in rounds if LIAR in r.asked}
    assert set(lies) == set(range(len(LIES))), "every kind was sent"
    assert all("refused" in why for why in lies.values()) and len(set(lies.values())) >= 10
    assert not any(LIAR in r.used for r in rounds)
    reasons = {why for r in rounds for c, why in r.failed.items() if c != LIAR}
    assert reasons == {"no answer", "an error: the battery is empty"}
    clean = Setup(rule, rounds=36, judge_every=36)
    clean.run()
    hurt, well = (s.strategy.judgements for s in (setup, clean))
    assert hurt[-1].after < 0.5 * hurt[0].after, "it learns all the same"
    assert hurt[-1].after < 2 * well[-1].after + 0.05


@pytest.mark.parametrize("name", RULES)
def test_a_server_that_was_killed_goes_on_to_the_same_bits(name, tmp_path):
    """Killed in the middle of a round, twice: no state in memory survives, the folder does."""
    rule = RULES[name]
    whole = Setup(rule, rounds=8, judge_every=2)
    theta = whole.run()

    class Killed(Exception):
        pass

    class Dying(LocalGrid):
        last = 99

        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    number = int(message.content.config_records["config"]["round"])
                    if number == self.last:
                        raise Killed
            return super().push_messages(messages)

    for last in (3, 6):
        setup = Setup(rule, rounds=8, judge_every=2, folder=tmp_path / "f", grid=Dying)
        setup.grid.last = last
        with pytest.raises(Killed):
            setup.run()
    setup = Setup(rule, rounds=8, judge_every=2, folder=tmp_path / "f")
    assert setup.run().tobytes() == theta.tobytes()
    assert [r.round for r in setup.strategy.rounds] == list(range(1, 9))
    found = [j.as_dict() for j in setup.strategy.judgements]
    assert found == [j.as_dict() for j in whole.strategy.judgements]
    rounds, judged = read_history(tmp_path / "f", 8)
    assert [r.as_dict() for r in rounds] == [r.as_dict() for r in setup.strategy.rounds]
    assert [j.as_dict() for j in judged] == found
    again = Setup(rule, rounds=8, judge_every=2, folder=tmp_path / "f")
    assert again.run().tobytes() == theta.tobytes(), "done: nothing is done again"
    assert len(again.strategy.rounds) == 8


def test_weights_leave_the_server_as_they_are_released(monkeypatch):
    """A wrapper adds noise to what a round came to: new clients too see the weights with it."""
    setup = Setup(FedAvg(rate=0.05, clients=3, query=8, batch=4), grid=Watched, judge_every=1)
    aggregate = setup.strategy.aggregate_train

    def noisy(number, replies):
        arrays, metrics = aggregate(number, replies)
        noise = arrays["shared"].numpy() + np.float32(number)
        return ArrayRecord({"shared": Array(noise)}), metrics

    monkeypatch.setattr(setup.strategy, "aggregate_train", noisy)
    setup.run()
    layout, sent = setup.site.training.layout, {}
    for message in setup.grid.passed[::2]:
        if message.metadata.message_type != "query":
            blob = message.content.array_records["shared"]["blob"].numpy().tobytes()
            found = decode(blob, model=layout.model, size=layout.size, kind="weights")
            sent[message.metadata.message_type, found.round] = found.values
    for number in (1, 2, 3):
        assert np.array_equal(sent["evaluate", number], sent["train", number + 1])
        assert sent["evaluate", number][5] == pytest.approx(sum(range(1, number + 1)))


def test_clients_that_are_away_do_not_change_who_is_chosen():
    class Half(LocalGrid):
        def get_node_ids(self):
            return [n for n in self.contexts if n != 3]  # client 2

    rule = FedAvg(rate=0.05, clients=3, query=8, batch=4)
    _, whole = play(rule, rounds=8)
    _, half = play(rule, rounds=8, grid=Half, wait_s=0)
    assert [r.asked for r in whole.rounds] == [r.asked for r in half.rounds]
    away = [r for r in half.rounds if 2 in r.asked]
    assert away and all(r.failed == {2: "not there"} for r in away)
    with pytest.raises(mo.ModicumError, match="no client is there"):
        play(rule, grid=empty_grid, wait_s=0)


def empty_grid(*args, **more):
    grid = LocalGrid(*args, **more)
    grid.get_node_ids = lambda: []
    return grid


def test_a_number_belongs_to_the_node_that_gave_it_first():
    class Twins(LocalGrid):
        """Nodes 1 and 2 say that they are client 0, node 3 that it is -7, node 4 nothing."""

        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "query":
                says = {2: 0, 3: -7, 4: "zero"}.get(message.metadata.dst_node_id)
                if says is not None:
                    reply.content.config_records["answer"]["client"] = says
            return reply

    _, strategy = play(FedAvg(rate=0.05, clients=6, query=8, batch=4), grid=Twins, wait_s=0)
    assert strategy._nodes[0] == 1 and set(strategy._nodes) == {0, 4, 5, 6, 7}
    for log in strategy.rounds:
        assert log.used == [0, 4, 5] and set(log.failed) == {1, 2, 3}


def test_two_servers_do_not_work_in_one_folder(tmp_path):
    class Second(LocalGrid):
        def push_messages(self, messages):
            with pytest.raises(UsageError, match="another server"):
                play(RULES["fedavg"], folder=tmp_path)
            return super().push_messages(messages)

    play(RULES["fedavg"], rounds=2, folder=tmp_path, grid=Second)
    play(RULES["fedavg"], rounds=2, folder=tmp_path)


def test_a_folder_of_another_federation_is_refused(tmp_path):
    play(RULES["fedavg"], folder=tmp_path)
    with pytest.raises(mo.InvalidInput, match="another rule"):
        play(RULES["reptile"], folder=tmp_path)
    with pytest.raises(mo.InvalidInput, match="another seed"):
        play(RULES["fedavg"], folder=tmp_path, seed=1)


def test_a_cut_last_line_of_the_history_is_passed_over(tmp_path):
    play(RULES["fedavg"], rounds=3, folder=tmp_path)
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text()[:-30])
    rounds, _ = read_history(tmp_path, 3)
    assert [r.round for r in rounds] == [1, 2]


def test_a_node_cannot_speak_for_another_client():
    """Who answered is known by the node that it came from."""

    class Posing(LocalGrid):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "train":
                reply.content.metric_records["metrics"]["client"] = 4
            return reply

    setup = Setup(FedAvg(rate=0.05, clients=2, query=8, batch=4), grid=Posing)
    setup.run()
    assert all(r.used == r.asked for r in setup.strategy.rounds)


def test_new_clients_never_train_for_others():
    setup = Setup(TinyReptile(query=8))
    setup.run()
    grid = setup.grid
    setup.strategy._call_roll(grid)
    asked = {c for r in setup.strategy.rounds for c in r.asked}
    assert asked <= set(range(6))
    layout = setup.site.training.layout
    blob = encode(Coded("weights", layout.model, 1, layout.size, setup.strategy.server.theta))
    message = FlowerMessage(RecordDict({"shared": blob_record(blob)}), 1, "evaluate")
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error() and "takes part in rounds" in reply.error.reason


def test_open_weights_go_with_whole_vectors_alone():
    with pytest.raises(UsageError, match="sent whole"):
        Setup(METAFED, open_weights=True)
    rule = FedAvg(rate=0.05, clients=3, query=8, batch=4)
    a, b = Setup(rule), Setup(rule, open_weights=True)
    np.testing.assert_allclose(a.run(), b.run(), atol=1e-6)


def test_a_rule_that_does_not_fit_the_model_or_the_board_says_so():
    with pytest.raises(UsageError, match="to be local"):
        run(METAFED.model_copy(update={"local": ("tail.*",)}))
    with pytest.raises(UsageError, match="learner"):
        federate(make_net(), EXAMPLE, TinyReptile(), Lines(), learner="cloud", shots=4)
    small = board("nano33ble").model_copy(update={"ram": 1536, "ram_total": 1536, "reserve": 512})
    with pytest.raises(mo.DoesNotFit):
        run(TinyReptile(), board=small)
