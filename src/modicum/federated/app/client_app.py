"""The clients' half of the app, as Flower's `clientapp` component."""

from __future__ import annotations

from modicum.federated.client_app import Site, client_app
from modicum.federated.flower import Context


def open_site(context: Context) -> Site:
    """Imported when it is needed: a process that only answers the roll call needs no PyTorch."""
    from modicum.federated.app import task

    return task.open_site(context)


app = client_app(open_site)
