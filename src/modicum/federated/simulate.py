"""The app on Flower's simulation engine: many clients on one machine, some at a time, with Ray."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from modicum.errors import ModicumError, ToolMissing, UsageError
from modicum.federated.app.task import Settings, run, site_of, strategy_of
from modicum.federated.client_app import Site, client_app
from modicum.federated.deploy.processes import TAG, stop_tagged
from modicum.federated.flower import Context, Grid, ServerApp, quiet
from modicum.federated.strategy import Federate

OBJECT_STORE = 128 << 20
"""Bytes of shared memory that messages travel through; Ray would take 30 % of the machine's."""

NICE = "RAY_worker_niceness"
"""15 if nothing is said: then anything else that the machine does stops the workers."""


def simulate(
    settings: Settings,
    *,
    cpus: int | None = None,
    cpus_per_client: float = 1.0,
    **more: Any,
) -> Federate:
    """Run all rounds that are left; returns the strategy, with its rounds, judgements and server.

    Ray starts as many workers as there are `cpus` (all of the machine's) for `cpus_per_client`
    each; a worker stands for one client after the other.  Everything that was started is stopped
    before this returns or raises.  `more` goes to `Federate`.

    Flower's `run_simulation` is used: it is deprecated in favour of `flwr run`, but that needs a
    SuperLink, which it leaves running; and it has no run config, so the settings are part of the
    app.  Raises what the app does, and ToolMissing without Ray.
    """
    cpus = cpus or os.cpu_count() or 1
    if not 0 < cpus_per_client <= cpus:
        raise UsageError(f"{cpus_per_client:g} CPUs for each client, the machine has {cpus}")
    if importlib.util.find_spec("ray") is None:
        raise ToolMissing("Ray is not installed", hint="pip install 'flwr[simulation]'")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns
    import ray
    from flwr.simulation import run_simulation

    if ray.is_initialized():
        raise UsageError("Ray is in use in this process", why="the simulation would stop it")

    settings = settings.model_copy(update={"cache": str(settings.place.absolute())})
    strategy = strategy_of(settings, **more)
    server = ServerApp()
    finished = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        run(settings, strategy, grid)
        finished.append(True)

    changed = _as_it_was("PYTHONPATH", "FLWR_HOME", NICE)
    with _ray_folder() as folder, changed, _stopped():
        os.environ["FLWR_HOME"] = folder
        os.environ.setdefault(NICE, "0")
        quiet(logging.ERROR)  # above its deprecation
        run_simulation(
            server, client_app(partial(_open, settings)),
            num_supernodes=settings.clients + settings.newcomers,
            backend_config=_backend(folder, cpus, cpus_per_client),
        )  # fmt: skip
    if not finished:
        raise ModicumError("the simulation ended before the federation did")
    return strategy


def _open(settings: Settings, context: Context) -> Site:
    """Known to Ray's workers by its name: the app itself is loaded anew with each message."""
    return site_of(settings.config(), context.node_config)


def _backend(folder: str, cpus: int, cpus_per_client: float) -> dict[str, Any]:
    """Ray on the loopback interface, with its files in a folder that goes away."""
    return {
        "init_args": {
            "num_cpus": cpus, "num_gpus": 0, "object_store_memory": OBJECT_STORE,
            "_node_ip_address": "127.0.0.1", "_temp_dir": folder,
            "log_to_driver": False, "logging_level": "ERROR",
        },
        "client_resources": {"num_cpus": cpus_per_client, "num_gpus": 0.0},
    }  # fmt: skip


@contextmanager
def _ray_folder() -> Iterator[str]:
    """Short: Ray makes sockets in it, and their paths have 107 characters at most."""
    folder = tempfile.mkdtemp(prefix="mo-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stopped() -> Iterator[None]:
    """Some of Ray's processes outlive its shutdown; a tag in their environment tells which."""
    tag = secrets.token_hex(8)
    with _as_it_was(TAG):
        os.environ[TAG] = tag
        try:
            yield
        finally:
            stop_tagged(tag, patience=5.0)


@contextmanager
def _as_it_was(*names: str) -> Iterator[None]:
    """Environment variables that are changed: PYTHONPATH by Flower's backend, for good."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
