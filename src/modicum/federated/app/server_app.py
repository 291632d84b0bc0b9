"""The server's half of the app, as Flower's `serverapp` component."""

from __future__ import annotations

from modicum.federated.app.task import Settings, run, strategy_of
from modicum.federated.flower import Context, Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds that are left of the run that the run config describes."""
    settings = Settings.of(context.run_config)
    run(settings, strategy_of(settings), grid)
