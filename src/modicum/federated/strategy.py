"""Flower's strategy over our server: it carries messages, and decides nothing."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.federated.client_app import blob_record, read_array, read_blob
from modicum.federated.codec import Message as Coded
from modicum.federated.codec import encode
from modicum.federated.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    Strategy,
)
from modicum.federated.server import RoundLog, Server

STATE, HISTORY = "server.npz", "history.jsonl"
ROLL_CALL_S = 120.0


@dataclass(frozen=True)
class Judgement:
    """How new clients did after a round: the mean over those that answered, each by its number.

    `failed` did not: they are not in the mean.
    """

    round: int
    before: float
    after: float
    each: dict[int, float]
    failed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "each": {str(k): v for k, v in self.each.items()}}


class Federate(Strategy):
    """Asks the clients that the server chooses, hands it their answers, and keeps a history.

    The first `clients` nodes by their `partition-id` take part, the others are new clients, which
    are judged every `judge_every` rounds (0: never).  With a `folder` the server's state and the
    history are on disk before each round, and a federation that was killed goes on from there:
    see `run_rounds`.  `open_weights` sends and takes plain arrays in the place of the codec's
    bytes, as Flower's wrappers for differential privacy need.
    """

    def __init__(
        self,
        server: Server,
        clients: int,
        *,
        judge_every: int = 0,
        folder: str | Path | None = None,
        open_weights: bool = False,
        wait_s: float = ROLL_CALL_S,
        on_round: Callable[[RoundLog], None] | None = None,
    ) -> None:
        rule = server.rule
        if open_weights and (
            rule.top < 1 or rule.values != "float32" or rule.downlink != "whole" or rule.feedback
        ):
            raise UsageError(
                "weights in the open are sent whole",
                why="differential privacy and secure aggregation add up whole vectors",
                hint='top=1, values="float32", downlink="whole", no feedback',
            )
        self.server, self.clients, self.judge_every = server, clients, judge_every
        self.folder = Path(folder) if folder is not None else None
        self.open_weights, self.wait_s, self.on_round = open_weights, wait_s, on_round
        self.rounds: list[RoundLog] = []
        self.judgements: list[Judgement] = []
        self._nodes: dict[int, int] = {}  # client -> node
        self._client: dict[int, int] = {}  # node -> client
        self._first = server.done

    # ---- Flower's calls -------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A list: Flower's deployment engine goes through it twice."""
        self._call_roll(grid, wait=server_round == 1)
        self._take_over(arrays)
        self._save()
        number = self._first + server_round
        asked = self.server.choose(number, range(self.clients))
        sent = self.server.open(asked, [c for c in asked if c in self._nodes])
        if self.open_weights and self.server.log is not None:
            self.server.log.bytes_down = 4 * self.server.size * len(sent)
        weights = ArrayRecord({"shared": Array(self.server.shown)})
        settings = {"round": number, "open": self.open_weights}
        return [
            self._message(
                RecordDict({
                    "shared": weights if self.open_weights else blob_record(sent[client]),
                    "config": ConfigRecord({**config, **settings}),
                }),
                client, "train", number,
            )
            for client in sent
        ]  # fmt: skip

    def _take_over(self, arrays: ArrayRecord) -> None:
        """The weights as they are released: wrappers may have added noise to them."""
        theta = arrays["shared"].numpy()
        if theta.shape != self.server.theta.shape:
            raise UsageError(f"the initial arrays have shape {theta.shape}", why="another model")
        self.server.theta = theta.astype(np.float32)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        for reply in sorted(replies, key=self._client_of):  # sums in one order
            self._receive(reply)
        log = self.server.close()
        self.rounds.append(log)
        self._append("round", log.as_dict())
        if self.on_round is not None:
            self.on_round(log)
        metrics: dict[str, Any] = {"used": len(log.used), "failed": len(log.failed)}
        if log.loss is not None:
            metrics["loss"] = log.loss
        return ArrayRecord({"shared": Array(self.server.theta)}), MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._take_over(arrays)
        number = self._first + server_round
        due = self.judge_every and (number % self.judge_every == 0 or number == self.server.rounds)
        return self.judging(number) if due else []

    def judging(self, number: int) -> list[Message]:
        """What new clients are sent after a round."""
        server = self.server
        weights = Coded("weights", server.model, number, server.size, server.theta)
        content = blob_record(encode(weights))
        return [
            self._message(RecordDict({"shared": content}), client, "evaluate", number)
            for client in sorted(self._nodes)
            if client >= self.clients
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        found = self.judged(self._first + server_round, replies)
        if found is None:
            return None
        return MetricRecord({"before": found.before, "after": found.after})

    def judged(self, number: int, replies: Iterable[Message]) -> Judgement | None:
        """The mean over the new clients that answered."""
        before, after = {}, {}
        for reply in replies:
            client = self._client_of(reply)
            try:
                metrics = reply.content.metric_records["metrics"]
                values = float(metrics["before"]), float(metrics["after"])
            except (ValueError, KeyError, TypeError):
                continue
            if all(map(math.isfinite, values)) and client >= self.clients:
                before[client], after[client] = values
        if not after:
            return None
        order = sorted(after)
        asked = sum(c >= self.clients for c in self._nodes)
        made = Judgement(
            number, float(np.mean([before[c] for c in order])),
            float(np.mean([after[c] for c in order])), {c: after[c] for c in order},
            asked - len(order),
        )  # fmt: skip
        self.judgements.append(made)
        self._append("judged", made.as_dict())
        return made

    def summary(self) -> None:
        """Flower asks for one; the rule says it all, and Flower logs the rest."""

    # ---- clients --------------------------------------------------------------------------------

    def _call_roll(self, grid: Grid, wait: bool = False) -> None:
        """Learn which node is which client, of the nodes that are there.

        With `wait`, until all that take part are there, for `wait_s` seconds at most; one has to
        be.  A number belongs to the node that gave it first, for as long as that node is there.
        """
        until = time.monotonic() + self.wait_s
        while True:
            there = set(grid.get_node_ids())
            unknown = sorted(n for n in there if n not in self._client)
            asked = [Message(RecordDict(), n, "query") for n in unknown]
            for reply in grid.send_and_receive(asked, timeout=self.wait_s) if asked else ():
                client, node = _number(reply), reply.metadata.src_node_id
                held = self._nodes.get(client)
                if client >= 0 and (held is None or held not in there):
                    if held is not None:
                        del self._client[held]
                    self._nodes[client], self._client[node] = node, client
            here = sum(c < self.clients for c in self._nodes)
            if not wait or here == self.clients:
                return
            if time.monotonic() > until:
                if here:
                    return
                raise ModicumError(f"no client is there after {self.wait_s:g} s")
            time.sleep(1)

    def _message(self, content: RecordDict, client: int, kind: str, number: int) -> Message:
        return Message(content, self._nodes[client], kind, group_id=str(number))

    def _client_of(self, reply: Message) -> int:
        """By the node that it came from; what a message says of itself is not asked."""
        return self._client.get(reply.metadata.src_node_id, -1)

    def _receive(self, reply: Message) -> None:
        client = self._client_of(reply)
        if reply.has_error():
            self.server.fail(client, f"an error: {reply.error.reason}")
            return
        try:
            metrics = reply.content.metric_records["metrics"]
            samples, loss = int(metrics["num-examples"]), float(metrics.get("loss", math.nan))
            if self.open_weights:
                shared = read_array(reply, "shared", "shared", np.float32)
                self.server.receive_weights(client, shared, samples, loss)
            else:
                self.server.receive(client, read_blob(reply, "shared"), samples, loss)
        except InvalidInput as error:
            self.server.fail(client, str(error.what))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.server.fail(client, f"the update is refused: malformed ({error!r})")

    # ---- files ----------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.server.save(self.folder / STATE)

    def _append(self, kind: str, what: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / HISTORY).open("a") as file:
                file.write(json.dumps({"kind": kind, **what}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def restore(self) -> None:
        """Go on from the folder, if something is there; what came after its state is forgotten."""
        if self.folder is None:
            return
        if not (self.folder / STATE).exists():
            (self.folder / HISTORY).unlink(missing_ok=True)  # of nothing that can be gone on from
            return
        self.server.restore(self.folder / STATE)
        self._first = self.server.done
        self.rounds, self.judgements = read_history(self.folder, self.server.done)
        lines = [{"kind": "round", **r.as_dict()} for r in self.rounds]
        lines += [{"kind": "judged", **j.as_dict()} for j in self.judgements]
        lines.sort(key=lambda line: (line["round"], line["kind"] == "judged"))
        part = self.folder / (HISTORY + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.replace(self.folder / HISTORY)

    def finish(self, arrays: ArrayRecord) -> None:
        """Keep the last state."""
        self.server.theta = arrays["shared"].numpy().astype(np.float32)
        self._save()


def _number(reply: Message) -> int:
    """What a node says its number is; -1 where it says nothing of the kind."""
    try:
        number = reply.content.config_records["answer"]["client"]
    except (KeyError, ValueError):
        return -1
    return number if type(number) is int else -1


def read_history(folder: Path, done: int) -> tuple[list[RoundLog], list[Judgement]]:
    """What happened up to a round.  A last line that was cut short is passed over."""
    rounds, judged = [], []
    path = folder / HISTORY
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
            if entry["round"] > done:
                continue
            if kind == "round":
                entry["failed"] = {int(k): v for k, v in entry["failed"].items()}
                rounds.append(RoundLog(**entry))
            else:
                entry["each"] = {int(k): v for k, v in entry["each"].items()}
                judged.append(Judgement(**entry))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rounds, judged


def run_rounds(
    strategy: Federate,
    grid: Grid,
    *,
    wrap: Callable[[Strategy], Strategy] = lambda strategy: strategy,
    timeout: float = 3600.0,
) -> None:
    """All rounds that are left, on any of Flower's grids; `wrap` puts a wrapper around.

    Before the first one new clients are judged too.  A state in the strategy's folder is gone on
    from; see `Server.restore` for the errors, and UsageError for a folder that another server is
    using.
    """
    with _held(strategy.folder):
        _run_rounds(strategy, grid, wrap, timeout)


def _run_rounds(
    strategy: Federate, grid: Grid, wrap: Callable[[Strategy], Strategy], timeout: float
) -> None:
    strategy.restore()
    server = strategy.server
    left = server.rounds - server.done
    if strategy.judge_every and server.done == 0 and not strategy.judgements:
        strategy._call_roll(grid, wait=True)
        strategy.judged(0, grid.send_and_receive(strategy.judging(0), timeout=timeout))
    if left:
        start = ArrayRecord({"shared": Array(server.theta)})
        result = wrap(strategy).start(grid, start, num_rounds=left, timeout=timeout)
        strategy.finish(result.arrays)


@contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """Two servers in one folder would write over each other's state."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another server is working in {folder}", hint="stop it, or another folder"
            ) from None
        yield
