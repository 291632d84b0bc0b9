"""A run of the app on one machine, on any of three engines; or the firmware of a client of it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from modicum.errors import ModicumError, UsageError
from modicum.federated.app.task import Settings, firmware_of, open_site, run, strategy_of
from modicum.federated.client_app import client_app
from modicum.federated.flower import quiet
from modicum.federated.strategy import HISTORY, Federate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code.  Rounds and judgements go to stdout, a line of JSON each."""
    chosen = vars(_parser().parse_args(arguments))
    engine = ENGINES[chosen.pop("engine")]
    torch.set_num_threads(1)  # as the other engines do: sums come out in one order
    try:
        engine(Settings.of({k: v for k, v in chosen.items() if v is not None}))
    except ModicumError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


def in_process(settings: Settings) -> None:
    """All in this process: nothing else runs."""
    from modicum.federated.grid import LocalGrid

    quiet()
    strategy = strategy_of(settings)
    nodes = settings.clients + settings.newcomers
    run(settings, strategy, LocalGrid(client_app(open_site), nodes, settings.config()))
    _show(strategy)


def simulation(settings: Settings) -> None:
    """Clients in the workers of Ray, on all CPUs."""
    from modicum.federated.simulate import simulate

    _show(simulate(settings))


def deployment(settings: Settings) -> None:
    """A server with TLS and a node for every client, each of their own processes, on loopback."""
    from modicum.federated.deploy.loopback import Loopback

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(settings.out or Path(scratch) / "out").resolve()
        with Loopback(Path(scratch) / "fleet") as fleet:
            for client in range(settings.clients + settings.newcomers):
                fleet.add_node({"partition-id": client})
            fleet.await_nodes()  # a roll call does not wait for new clients
            given = settings.model_copy(update={"out": str(out)})
            fleet.wait(fleet.submit(given.config()))
        print((out / HISTORY).read_text(), end="")


def firmware(settings: Settings) -> None:
    """No run: the C of a client on a board goes into the folder --out."""
    if not settings.out:
        raise UsageError("the firmware goes into --out")
    folder = firmware_of(settings, settings.out)
    print(f"{folder}: make link-m4f, or with a port of your own (docs/board-link.md)")


ENGINES: Mapping[str, Callable[[Settings], None]] = {
    "process": in_process, "simulation": simulation, "deployment": deployment,
    "firmware": firmware,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m modicum.federated.app", description=__doc__)
    what = "; ".join(f"{name}: {run.__doc__}" for name, run in ENGINES.items())
    parser.add_argument("engine", choices=ENGINES, help=what)
    for name, field in Settings.model_fields.items():
        kind: type = type(field.default)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="",
            help=f"{field.description} (default: {field.default!r})",
        )  # fmt: skip
    return parser


def _show(strategy: Federate) -> None:
    lines = [{"kind": "round", **r.as_dict()} for r in strategy.rounds]
    lines += [{"kind": "judged", **j.as_dict()} for j in strategy.judgements]
    for line in sorted(lines, key=lambda line: (line["round"], line["kind"] == "judged")):
        print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
