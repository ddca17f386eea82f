"""Build the planet and serve it: ``python -m geofm.planet --out DIR --serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from data_catalog.errors import GeofmError
from data_catalog.progress import listen
from geofm.planet.catalog.server import serve_world
from geofm.planet.preview import save_preview
from geofm.planet.world import build_world


def main(
    out: Annotated[Path, typer.Option(help="Folder of the worlds.", file_okay=False)],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world.")] = 7,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the world until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free port.")] = 0,
    preview: Annotated[
        Path | None, typer.Option(help="PNG file for a picture of all scenes.", dir_okay=False)
    ] = None,
) -> None:
    """Build the embedded procedural Earth as COGs, and serve it as a STAC API on 127.0.0.1.

    Prints the folder of the world, and with --serve the address of the API.
    """
    try:
        with Progress(transient=True) as bar:
            job = bar.add_task("planet")

            def show(stage: str, done: int, total: int, note: str) -> None:
                bar.update(job, completed=done, total=total, description=f"{stage}: {note}"[:48])

            with listen(show):
                root = build_world(out, seed)
        typer.echo(root)
        if preview is not None:
            save_preview(root, preview)
            typer.echo(preview)
        if serve:
            with serve_world(root, port) as served:
                typer.echo(served.url)
                served.wait()
    except GeofmError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)


if __name__ == "__main__":
    typer.run(main)
