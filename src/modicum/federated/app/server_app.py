"""The server's half of the app, as Flower's `serverapp` component."""

from __future__ import annotations

from modicum.federated.app.task import Settings, strategy_of
from modicum.federated.flower import Context, Grid, ServerApp
from modicum.federated.strategy import run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds that are left of the run that the run config describes."""
    settings = Settings.of(context.run_config)
    run_rounds(strategy_of(settings), grid, timeout=settings.timeout)
