"""The clients' half of the app, as Flower's `clientapp` component."""

from __future__ import annotations

from modicum.federated.app.task import open_site
from modicum.federated.client_app import client_app

app = client_app(open_site)
