"""The server of a federation: whom to ask, what to send, what to believe, and the outer step.

    theta <- theta + eps_t * sum_i w_i delta_i / sum_i w_i

With eps = 1 and whole changes that is FedAvg, with one client Reptile.  No message of Flower is
known here: `strategy` carries them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from modicum.errors import InvalidInput, ModicumError, UsageError
from modicum.federated.codec import Message, decode, encode, encoded_size, largest
from modicum.federated.rules import FederatedRule

Array = NDArray[np.float32]

LIMIT = 1e3
"""No honest change of a weight in one round is larger."""
LONGEST = 200
"""Characters of a reason that are kept."""
VERSION = 1


@dataclass
class RoundLog:
    """What happened in a round.  Bytes are those of the codec, of all messages sent and received.

    `failed` has, by client, why its answer was not used.
    """

    round: int
    eps: float
    asked: list[int]
    used: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    loss: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    clipped: int = 0
    norm: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "failed": {str(k): v for k, v in self.failed.items()}}


class Server:
    """The weights that a federation learns, and what it needs to go on after a crash.

    Memory: four vectors of the shared weights' size, and one number for each client that keeps
    weights; updates are added up one by one (Flower holds the answers of a round until then).
    """

    def __init__(
        self, rule: FederatedRule, model: bytes, start: Array, rounds: int, seed: int = 0
    ) -> None:
        if rounds < 1:
            raise UsageError(f"cannot federate for {rounds} rounds", hint="1 or more")
        if start.ndim != 1 or not np.isfinite(start).all():
            raise InvalidInput("the initial weights are not a vector of finite numbers")
        self.rule, self.model, self.rounds, self.seed = rule, model, rounds, seed
        self.theta = start.astype(np.float32)
        self.shown = self.theta.copy()  # what clients are sent: theta, or the largest of its moves
        self.changed = np.zeros(len(start), np.uint32)  # the round that changed it last
        self.have: dict[int, int] = {}  # client -> round of the weights that it keeps
        self.done = 0
        self.log: RoundLog | None = None

    @property
    def size(self) -> int:
        return len(self.theta)

    def choose(self, round: int, clients: Sequence[int]) -> list[int]:
        """Clients of a round, ascending; the same ones whenever it is asked."""
        wanted = min(self.rule.clients, len(clients))
        rng = np.random.default_rng([self.seed, round])
        return sorted(int(c) for c in rng.choice(np.sort(clients), wanted, replace=False))

    def open(self, asked: Sequence[int], there: Sequence[int] | None = None) -> dict[int, bytes]:
        """Begin the next round: what each of these clients is sent, if it is `there` (None: all).

        A client whose answer does not arrive is sent all weights the next time.
        """
        round = self.done + 1
        self._show(self.done)
        eps = self.rule.outer.step_size(round, self.rounds)
        self.log = RoundLog(round, eps, list(asked))
        self._sum, self._weight = np.zeros(self.size, np.float64), 0.0
        self._losses: list[float] = []
        whole = encode(Message("weights", self.model, round, self.size, self.shown))
        sent = {}
        for client in asked:
            if there is not None and client not in there:
                self.fail(client, "not there")
                continue
            sent[client] = self._download(client, round, whole)
            self.log.bytes_down += len(sent[client])
        return sent

    def receive(self, client: int, blob: bytes, samples: int, loss: float = math.nan) -> str | None:
        """Take a client's update into the mean, or say why not."""
        log = self._open_log()
        log.bytes_up += len(blob)
        try:
            most = encoded_size(self.size, self.size)
            if len(blob) > most:
                raise InvalidInput(
                    "the update is refused: it is too large", why=f"{len(blob)} bytes of {most}"
                )
            message = decode(
                blob, model=self.model, size=self.size, kind="delta", round=log.round, limit=LIMIT
            )
            self._take(client, message.dense(), samples, loss)
        except InvalidInput as error:
            return self.fail(client, one_line(error))
        return None

    def receive_weights(
        self, client: int, shared: Array, samples: int, loss: float = math.nan
    ) -> str | None:
        """The same for an update that came as weights in the open, which the codec did not see.

        Flower's wrappers for differential privacy need it so.  4 bytes a weight are counted.
        """
        self._open_log().bytes_up += 4 * self.size
        try:
            if shared.shape != (self.size,) or shared.dtype != np.float32:
                raise InvalidInput(
                    "the update is refused: it is of another model",
                    why=f"{shared.dtype} of shape {shared.shape}, {self.size} weights are shared",
                )
            with np.errstate(all="ignore"):
                delta = shared - self.shown
            if not np.abs(delta).max() <= LIMIT:
                raise InvalidInput("the update is refused: a value is not finite or out of range")
            self._take(client, delta, samples, loss)
        except InvalidInput as error:
            return self.fail(client, one_line(error))
        return None

    def _take(self, client: int, change: Array, samples: int, loss: float) -> None:
        log = self._open_log()
        if client not in log.asked:
            raise InvalidInput("the update is refused: the client was not asked")
        if client in log.used:
            raise InvalidInput("the update is refused: it is the second one of the client")
        if not 1 <= samples <= self.rule.query:
            raise InvalidInput(
                f"the update is refused: it claims {samples} samples",
                why=f"{self.rule.query} were asked for",
            )
        delta = change.astype(np.float64)
        norm = float(np.linalg.norm(delta))
        if self.rule.clip is not None and norm > self.rule.clip:
            delta *= self.rule.clip / norm
            log.clipped += 1
        weight = float(samples) if self.rule.weighting == "samples" else 1.0
        self._sum += weight * delta
        self._weight += weight
        if math.isfinite(loss):
            self._losses.append(loss)
        log.used.append(client)
        if self.rule.downlink == "changed":
            self.have[client] = log.round

    def fail(self, client: int, why: str) -> str:
        """A client's answer is missing or not to be used.  What it says is cut and cleaned."""
        log = self._open_log()
        why = "".join(c if c.isprintable() else " " for c in why[:LONGEST])
        if client not in log.used:
            log.failed.setdefault(client, why)
        return why

    def close(self) -> RoundLog:
        """The outer step.  Without a usable update nothing changes but the round."""
        log = self._open_log()
        for client in log.asked:
            if client not in log.used and client not in log.failed:
                self.fail(client, "no answer")
        log.used.sort()
        if self._weight:
            step = log.eps * self._sum / self._weight
            before, self.theta = self.theta, (self.theta + step).astype(np.float32)
            log.norm = float(np.linalg.norm(self.theta.astype(np.float64) - before))
        log.loss = float(np.mean(self._losses)) if self._losses else None
        self.done, self.log = log.round, None
        return log

    def _show(self, round: int) -> None:
        """Move what clients are sent towards theta: all of it, or the largest differences.

        Where it moved is noted as changed by the round that is over.
        """
        gap = self.theta - self.shown
        where = largest(gap, self.rule.downlink_top)
        moved = np.flatnonzero(gap) if where is None else where
        self.shown[moved] = self.theta[moved]
        self.changed[moved] = round

    def _download(self, client: int, round: int, whole: bytes) -> bytes:
        base = self.have.pop(client, None) if self.rule.downlink == "changed" else None
        if base is None:
            return whole
        where = np.flatnonzero(self.changed >= base)
        part = Message("weights", self.model, round, self.size, self.shown[where], where, base)
        blob = encode(part)
        return blob if len(blob) < len(whole) else whole

    def _open_log(self) -> RoundLog:
        if self.log is None:
            raise UsageError("no round is open", hint="open(round, clients) first")
        return self.log

    # ---- what survives a crash ------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write what the next round needs, all or nothing."""
        if self.log is not None:
            raise UsageError("a round is open", hint="close() it before saving")
        head = {
            "version": VERSION, "rule": self.rule.model_dump(mode="json"), "rounds": self.rounds,
            "seed": self.seed, "done": self.done, "model": self.model.hex(),
        }  # fmt: skip
        target = Path(path)
        part = target.with_name(target.name + ".part")
        with part.open("wb") as file:
            np.savez(
                file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), theta=self.theta,
                shown=self.shown, changed=self.changed,
            )  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)

    def restore(self, path: str | Path) -> None:
        """Go on from a saved state; what clients keep is not trusted, they are sent all again.

        Raises InvalidInput, and changes nothing, for a file that is damaged, or of another rule,
        model, seed or number of rounds.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                theta, shown, changed = (file[k] for k in ("theta", "shown", "changed"))
            done = int(head["done"])
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile,
        ) as error:  # fmt: skip
            raise InvalidInput(f"{path} is not a saved server", why=str(error)) from None
        mine = {
            "version": VERSION, "rule": self.rule.model_dump(mode="json"), "rounds": self.rounds,
            "seed": self.seed, "model": self.model.hex(),
        }  # fmt: skip
        for key, value in mine.items():
            if head.get(key) != value:
                raise InvalidInput(
                    f"{path} was saved by a federation with another {key}",
                    why=f"{head.get(key)!r}, here {value!r}",
                    hint="another folder, or the settings that it was begun with",
                )
        for vector in (theta, shown, changed):
            if vector.shape != self.theta.shape or not np.isfinite(vector).all():
                raise InvalidInput(f"{path} holds weights that are not of this model")
        if not 0 <= done <= self.rounds:
            raise InvalidInput(f"{path} was saved after round {done} of {self.rounds}")
        self.theta, self.shown = theta.astype(np.float32), shown.astype(np.float32)
        self.changed, self.have, self.done = changed.astype(np.uint32), {}, done


def one_line(error: ModicumError) -> str:
    """An error and its reason, for a log."""
    why = "; ".join(error.details.get("why", []))
    return f"{error.what} ({why})" if why else error.what
