"""Differential privacy of a client's part in a round, by Flower's wrapper around our strategy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from modicum.errors import InvalidInput, UsageError
from modicum.federated.client_app import read_array
from modicum.federated.flower import (
    ArrayRecord,
    DifferentialPrivacyServerSideFixedClipping,
    Message,
    MetricRecord,
)
from modicum.federated.strategy import Federate


class Noisy(DifferentialPrivacyServerSideFixedClipping):
    """Clips each client's change to the norm `clip`, and adds noise to the weights after a round.

        sigma = 2 * noise * clip / k        where k clients were used

    With one client more or less among them their mean changes by at most 2 clip / k (its own
    change, and the weights of the others), the released weights by eps <= 1 of that.  Who is asked
    follows from the seed: sampling amplifies nothing.  `strategy` sends `open_weights`, and weights
    clients alike: otherwise UsageError.  The noise is drawn from numpy's global generator.  Losses
    and judgements are not private: they are as they are.

    Flower's own wrapper gives a round up for one client that failed, ends in an error for one that
    sent something else, and adds noise for as many as were asked, too little if fewer answered.
    Here they are left out, with the reason in the history.
    """

    def __init__(self, strategy: Federate, noise: float, clip: float) -> None:
        rule = strategy.server.rule
        if not strategy.open_weights:
            raise UsageError("differential privacy adds noise to weights in the open",
                             hint="Federate(..., open_weights=True)")  # fmt: skip
        if rule.weighting != "clients":
            raise UsageError("a client's share in the mean has to be known beforehand",
                             hint='a rule with weighting="clients"')  # fmt: skip
        if max(rule.outer.start, rule.outer.end) > 1:
            why = f"outer goes from {rule.outer.start:g} to {rule.outer.end:g}"
            raise UsageError("the noise is for steps of the server up to 1", why=why)
        if noise < 0 or not 0 < clip < np.inf:
            raise UsageError(f"noise {noise:g} and clip {clip:g}", why="noise >= 0, clip > 0")
        super().__init__(strategy, 2 * noise, clip, rule.clients)
        self.federate = strategy

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        usable = []
        for reply in replies:
            why = self._refused(reply)
            if why is None:
                usable.append(reply)
            else:
                self.federate.server.fail(self.federate._client_of(reply), why)
        if not usable:  # the wrapper would not end the round
            return self.federate.aggregate_train(server_round, [])
        return super().aggregate_train(server_round, usable)

    def _refused(self, reply: Message) -> str | None:
        """Why it cannot be clipped, which only one finite vector of the weights' size can."""
        if reply.has_error():
            return f"an error: {reply.error.reason}"
        try:
            found = read_array(reply, "shared", "shared", np.float32)
        except InvalidInput as error:
            return error.what
        sizes = [len(record) for record in reply.content.array_records.values()]
        if sizes != [1] or found.shape != self.federate.server.theta.shape:
            return "the update is refused: it is of another model"
        return None if np.isfinite(found).all() else "the update is refused: it is not finite"

    def _add_noise_to_aggregated_arrays(self, aggregated_arrays: ArrayRecord) -> ArrayRecord:
        self.num_sampled_clients = len(self.federate.rounds[-1].used)
        if not self.num_sampled_clients:  # nothing of any client is in it
            return aggregated_arrays
        return super()._add_noise_to_aggregated_arrays(aggregated_arrays)
