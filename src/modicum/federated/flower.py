"""The one door to Flower: its names, and what it would do by itself switched off before.

Flower reports usage, asks for updates and installs packages at run time unless told not to, and
keeps its state in the home folder.  These variables are read when it is imported, so everything
under `federated` that needs Flower imports it from here.
"""

from __future__ import annotations

import importlib.util
import logging
import os

from modicum.errors import ToolMissing

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What a process that runs Flower, or is started by it, has in its environment."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

if importlib.util.find_spec("flwr") is None:
    raise ToolMissing("Flower is not installed", hint="pip install 'modicum[federated]'")

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import (  # noqa: E402
    DifferentialPrivacyServerSideFixedClipping,
    Result,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

__all__ = [
    "QUIET",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "DifferentialPrivacyServerSideFixedClipping",
    "Error",
    "Grid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "Result",
    "ServerApp",
    "Strategy",
    "identify",
    "quiet",
    "stamp",
]


def identify() -> None:
    """Let this process make messages outside of Flower's own runtimes.

    Flower 1.41 wants a task identity for that, which is not part of its public interface.
    """
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def stamp(message: Message, number: int) -> None:
    """Give a message the number that Flower's link would have given it (1.41, not public)."""
    message.metadata.__dict__["_message_id"] = str(number)


def quiet(level: int = logging.WARNING) -> None:
    """Flower says only what goes wrong."""
    logging.getLogger("flwr").setLevel(level)
