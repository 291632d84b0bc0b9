"""A grid whose nodes fail and lie, to see what a federation does about it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from modicum.federated.client_app import blob_record
from modicum.federated.codec import Message as Coded
from modicum.federated.codec import encode
from modicum.federated.flower import ClientApp, Error, Message, MetricRecord, RecordDict
from modicum.federated.grid import RAISED, LocalGrid
from modicum.federated.layout import Layout

LIES = (
    "cut short", "damaged", "of another model", "replayed", "weights", "of another size",
    "too large", "no update", "no weights", "no numbers", "not finite", "out of range",
    "endless numbers",
)  # fmt: skip


class FaultyGrid(LocalGrid):
    """Each answer of a round is lost, or is an error, with the probability `share`.

    The clients `liars` never answer honestly: in round t they send the t-th kind of bad update.
    What fails is a function of (seed, client, round).
    """

    def __init__(
        self, app: ClientApp, nodes: int, layout: Layout, *, share: float = 0.3,
        liars: tuple[int, ...] = (), seed: int = 0, config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(app, nodes, config)
        self.layout, self.share, self.liars, self.seed = layout, share, liars, seed

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is None or message.metadata.message_type != "train":
            return reply
        client = message.metadata.dst_node_id - 1
        number = int(message.content.config_records["config"]["round"])
        if client in self.liars:
            return self._lie(message, reply, number)
        rng = np.random.default_rng([self.seed, client, number])
        if rng.random() >= self.share:
            return reply
        if rng.random() < 0.5:
            return None
        return Message(Error(code=RAISED, reason="the battery is empty"), reply_to=message)

    def _lie(self, message: Message, reply: Message, number: int) -> Message:
        kind = LIES[number % len(LIES)]
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.0})})
        if kind == "no numbers":
            content = RecordDict()
        if kind == "endless numbers":
            content["metrics"] = MetricRecord({"num-examples": float("inf"), "loss": 0.0})
        if kind != "no weights":
            content["shared"] = blob_record(self._bad(kind, reply, number))
        return Message(content, reply_to=message)

    def _bad(self, kind: str, reply: Message, number: int) -> bytes:
        """An update that is wrong in one way, and right in all others."""
        layout = self.layout
        right: dict[str, Any] = {
            "kind": "delta", "model": layout.model, "round": number, "size": layout.size,
            "values": np.full(layout.size, 0.1, np.float32),
        }  # fmt: skip
        blob = encode(Coded(**right))
        if kind == "cut short":
            return blob[:-7]
        if kind == "damaged":
            return blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]
        if kind == "too large":
            return blob + bytes(10**6)
        if kind == "no update":
            return b"hello"
        if kind == "not finite":
            return _with_values(blob, np.full(layout.size, np.nan, "<f4"))
        wrong: dict[str, dict[str, Any]] = {
            "of another model": {"model": bytes(16)},
            "replayed": {"round": number - 1},
            "weights": {"kind": "weights"},
            "of another size": {
                "size": layout.size + 1, "values": np.zeros(layout.size + 1, np.float32)
            },
            "out of range": {"values": np.full(layout.size, 1e30, np.float32)},
        }  # fmt: skip
        return encode(Coded(**{**right, **wrong.get(kind, {})}))


def _with_values(blob: bytes, values: np.ndarray) -> bytes:
    """The message with other values and the CRC that belongs to them."""
    raw = values.tobytes()
    body = blob[: -4 - len(raw)] + raw
    return body + struct.pack("<I", zlib.crc32(body))
