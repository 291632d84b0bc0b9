"""A federation in one process: Flower's strategy and client app without Ray or a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modicum.federated.flower import (
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    identify,
    stamp,
)

RAISED = 2
"""Flower's code for a client app that raised an error."""


class LocalGrid(Grid):
    """Nodes 1 to `nodes`, which answer at once, in the order in which they are asked.

    Deterministic: the same messages give the same answers.  A client app that raises an error
    answers with it, as Flower's runtimes do.  `partition-id` of node k is k - 1.
    """

    def __init__(self, app: ClientApp, nodes: int, config: Mapping[str, Any] | None = None) -> None:
        identify()
        self.app = app
        self.contexts = {
            node: Context(
                run_id=1, node_id=node, state=RecordDict(), run_config=dict(config or {}),
                node_config={"partition-id": node - 1, "num-partitions": nodes},
            )
            for node in range(1, nodes + 1)
        }  # fmt: skip
        self._sent = 0
        self._answers: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("Message(content, node, type)")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            self._sent += 1
            stamp(message, self._sent)
            answer = self.answer(message)
            if answer is not None:
                self._answers[str(self._sent)] = answer
            numbers.append(str(self._sent))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(i) for i in message_ids if i in self._answers]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def answer(self, message: Message) -> Message | None:
        """What a node says to a message; None: nothing, in the time that there is."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(
                Error(code=2, reason=f"{type(error).__name__}: {error}"), reply_to=message
            )
