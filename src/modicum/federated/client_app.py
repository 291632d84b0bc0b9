"""The client app: the same in one process, under Flower's simulation, and on devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, ModicumError
from modicum.federated.client import Kept, settle, take_part
from modicum.federated.codec import Message as Coded
from modicum.federated.codec import decode, encode
from modicum.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from modicum.federated.grid import RAISED
from modicum.federated.learner import Learner
from modicum.federated.rules import FederatedRule
from modicum.federated.server import one_line

if TYPE_CHECKING:
    from modicum.federated.populations import Population


@dataclass(frozen=True)
class Site:
    """What the client app of a process works with, for all clients that it stands for.

    `training` is the learner of `rule.training`, `deployment` that of `rule.deployment` for `few`
    samples in all: what `shots` (of each class) come to; 0 where any number does.  A new client is
    tested on `tests` samples, `tasks` times with other ones.
    """

    rule: FederatedRule
    population: Population
    training: Learner
    deployment: Learner
    shots: int = 10
    tests: int = 50
    tasks: int = 1
    seed: int = 0
    few: int = 0


def client_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """A Flower client app over sites: `open_site` is asked with each message, and had better
    remember what it made.

    Node k of `partition-id` k is the population's k-th client; those from `population.clients` on
    are the new clients, which never train for others.
    """
    app = ClientApp()

    @app.query()
    def roll_call(message: Message, context: Context) -> Message:
        answer = ConfigRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, lambda: _train(open_site(context), message, context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, lambda: _evaluate(open_site(context), message, context))

    return app


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    """What the work gives, or its error as one line: Flower's own report is a stack trace."""
    try:
        return Message(work(), reply_to=message)
    except ModicumError as error:
        return Message(Error(code=RAISED, reason=one_line(error)), reply_to=message)


def _train(site: Site, message: Message, context: Context) -> RecordDict:
    client = int(context.node_config["partition-id"])
    config = message.content.config_records["config"]
    number, open_ = int(config["round"]), bool(config.get("open", False))
    download = _weights_blob(site, message, number) if open_ else read_blob(message, "shared")
    rng = np.random.default_rng([site.seed, client, number])
    rule = site.rule
    support, query = site.population.streams(client, rule.support, rule.query, rng)
    kept = _load(context)
    learned = take_part(site.training, rule, download, support, query, kept)
    _store(context, learned.kept)
    metrics: dict[str, Any] = {"num-examples": learned.samples, "client": client}
    if math.isfinite(learned.loss):
        metrics["loss"] = learned.loss
    shared = (
        ArrayRecord({"shared": Array(site.training.shared())})
        if open_
        else blob_record(learned.upload)
    )
    return RecordDict({"shared": shared, "metrics": MetricRecord(metrics)})


def _evaluate(site: Site, message: Message, context: Context) -> RecordDict:
    client = int(context.node_config["partition-id"])
    which = client - site.population.clients
    if not 0 <= which < site.population.newcomers:
        raise InvalidInput(f"client {client} takes part in rounds: it is not a new one")
    layout = site.deployment.layout
    blob = read_blob(message, "shared")
    shared = decode(blob, model=layout.model, size=layout.size, kind="weights").dense()
    before, after = [], []
    for task in range(site.tasks):
        # the same tasks whenever it is asked, so that rounds can be compared
        rng = np.random.default_rng([site.seed, client, 0, task])
        shots, tests = site.population.newcomer(which, site.shots, site.tests, rng)
        if site.few and len(shots) != site.few:
            raise InvalidInput(
                f"new client {which} has {len(shots)} samples to learn from",
                why=f"the plan that it reconstructs its local part by is for {site.few}",
            )
        judged = settle(site.deployment, site.rule, shared, shots, tests)
        before.append(judged.before)
        after.append(judged.after)
    metrics: dict[str, Any] = {
        "before": float(np.mean(before)), "after": float(np.mean(after)), "client": client,
        "num-examples": site.tests * site.tasks,
    }  # fmt: skip
    return RecordDict({"metrics": MetricRecord(metrics)})


# ---- records ------------------------------------------------------------------------------------


def blob_record(blob: bytes) -> ArrayRecord:
    """The codec's bytes as one array: each array of Flower's costs 128 bytes of header."""
    return ArrayRecord({"blob": Array(np.frombuffer(blob, np.uint8))})


def read_blob(message: Message, name: str) -> bytes:
    """The codec's bytes of a message.  Raises InvalidInput for a message without them."""
    return np.ascontiguousarray(read_array(message, name, "blob", np.uint8)).tobytes()


def read_array(message: Message, name: str, key: str, dtype: Any) -> NDArray[Any]:
    """One array of a message, which has to be there, flat and of this type."""
    try:
        found = message.content.array_records[name][key].numpy()
    except Exception as error:  # whatever a foreign message makes numpy say
        raise InvalidInput("the update is refused: it has no weights", why=str(error)) from None
    if found.ndim != 1 or found.dtype != dtype:
        raise InvalidInput(
            "the update is refused: its weights are of another form",
            why=f"{found.dtype} of shape {found.shape}",
        )
    return found


def _weights_blob(site: Site, message: Message, number: int) -> bytes:
    """Weights that came in the open, as the codec has them."""
    layout = site.training.layout
    shared = layout.check(read_array(message, "shared", "shared", np.float32))
    return encode(Coded("weights", layout.model, number, layout.size, shared))


def _load(context: Context) -> Kept:
    if "kept" not in context.state.array_records:
        return Kept()
    arrays = context.state.array_records["kept"]
    number = int(context.state.config_records["kept-round"]["round"])
    get = {name: arrays[name].numpy() for name in arrays}
    return Kept(get.get("shared"), number, get.get("unsent"))


def _store(context: Context, kept: Kept) -> None:
    arrays = {
        name: Array(value)
        for name, value in (("shared", kept.shared), ("unsent", kept.unsent))
        if value is not None
    }
    if arrays:
        context.state["kept"] = ArrayRecord(arrays)
        context.state["kept-round"] = ConfigRecord({"round": kept.round})
