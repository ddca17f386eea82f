"""Commands for the standing server: ``geofm up``, ``geofm down`` and ``geofm env``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Annotated

import typer

from flows.cli.console import err, out, print_json
from flows.cli.options import Catalog, Json, Store

#: Seconds that a worker may take to end when `geofm up` has ended.
WORKER_GRACE_S = 30.0


def up(
    store: Store = "",
    catalog: Catalog = "",
    detach: Annotated[
        bool, typer.Option("--detach", help="Start the worker in the background, and return.")
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            envvar="GEOFM_SERVER_HOST",
            help="Address that a new server listens on; 0.0.0.0 is every interface, without "
            "encryption. [default: 127.0.0.1, this machine only]",
        ),
    ] = "",
) -> None:
    """Start a Prefect server and a worker, with forms to refresh, pretrain, evaluate and audit.

    In the UI, choose a deployment, click Run, and fill in the form: empty fields are as in the
    recipe. Schedules and whatever else was changed in the UI stay as they are. The UI asks for
    a password once per browser: the value of PREFECT_API_AUTH_STRING that `geofm env` prints. If
    PREFECT_API_URL is set, that server is used and none is started.

    Example: `geofm up --store /data/store --detach`
    """
    from data_catalog.storage.process import child_command
    from flows.server import HOST, find_or_launch, note_worker, running_worker, wait_for
    from flows.settings import open_place

    if host:
        os.environ[HOST] = host

    def tell(line: str) -> None:
        out.print(line, highlight=False)

    place = open_place(store, catalog)
    tell(f"store       {place.store.url}")
    server = find_or_launch()
    tell(f"Prefect     {server.ui}, starting" if server.pid else f"Prefect     {server.ui}")
    wait_for(server)
    from flows.deployments import POOL, deploy_all

    # No deployment has an address: the worker gets them from the environment. That of the catalogue
    # may hold a password, and Prefect stores parameters.
    os.environ["GEOFM_STORE"], os.environ["GEOFM_CATALOG"] = place.store.url, place.catalogue.url
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "geofm")
    deploy_all(tell)
    tell(f"Prefect     {server.ui}")
    if server.pid:
        out.print(
            "password    `geofm env` prints it; the UI asks once per browser", highlight=False
        )
    start_worker = ["worker", "start", "--pool", POOL, "--type", "process"]
    if pid := running_worker(server, place.store.url, tell):
        tell(f"worker      pid {pid}, already running")
        return
    if detach:
        log = (place.store.local_root / "worker.log").open("ab")
        worker = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "prefect", *start_worker],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ,
            start_new_session=True,
        )
        note_worker(worker.pid, place.store.url)
        out.print(f"worker      pid {worker.pid}, log {log.name}", highlight=False)
        return
    err.print("The worker runs until Ctrl-C; the server stays until `geofm down`.", highlight=False)
    worker_command = child_command("prefect", *start_worker, grace_s=WORKER_GRACE_S)
    raise typer.Exit(subprocess.call(worker_command, env=os.environ))  # noqa: S603


def down() -> None:
    """Stop the Prefect server that geofm started, and its background worker."""
    from flows.server import stop_server, stop_worker

    worker, server = stop_worker(), stop_server()
    out.print("stopped" if worker or server else "no server that geofm started is running")


def env(json_: Json = False) -> None:
    """Print the address and the password of the Prefect server, as variables for a shell.

    Example: `eval "$(geofm env)"`, then `prefect flow-run ls`
    """
    from flows.server import client_variables

    variables = client_variables()
    if json_:
        print_json(variables)
        return
    pairs = (f"{name}={shlex.quote(value)}" for name, value in variables.items())
    typer.echo(f"export {' '.join(pairs)}")


def add_to(app: typer.Typer) -> None:
    """Add the server's commands."""
    app.command()(up)
    app.command()(down)
    app.command()(env)
