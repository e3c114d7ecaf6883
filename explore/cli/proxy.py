"""The `proxy` command: serve a storage to workers on other hosts."""

from __future__ import annotations

from typing import Annotated

import typer

from explore.cli.app import app, err


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore proxy postgresql+psycopg://user@db/sweeps --port 13000, then --storage grpc://HOST:13000",
)
def proxy(
    storage: Annotated[str, typer.Argument(metavar="STORAGE", help="A storage URL, or a folder of runs.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 13000,
) -> None:
    """Serve a storage to workers on other hosts with Optuna's gRPC proxy, which keeps database connections few."""
    from explore.study import serve_storage

    serve_storage(storage, host, port, lambda line: err.print(f"{line}; Ctrl-C stops it", highlight=False))
