"""Commands for the standing server: ``geofm up``, ``geofm down`` and ``geofm env``."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from typing import Annotated, Literal

import typer

from flows.cli.console import err, out, print_json
from flows.cli.options import Catalog, Json, Store

Pool = Literal["cpu", "gpu"]


def up(
    store: Store = "",
    catalog: Catalog = "",
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Keep the workers running in the background, and return."),
    ] = False,
    only: Annotated[
        Pool | None,
        typer.Option(
            "--only",
            help="Start only the worker of the pool geofm-cpu, or of geofm-gpu, which trains: for "
            "workers on several machines. [default: both]",
        ),
    ] = None,
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
    """Start a Prefect server and workers, with forms to refresh, pretrain, evaluate and audit.

    In the UI, choose a deployment, click Run, and fill in the form: empty fields are as in the
    recipe. Schedules and whatever else was changed in the UI stay as they are. The UI asks for
    a password once per browser: the value of PREFECT_API_AUTH_STRING that `geofm env` prints. If
    PREFECT_API_URL is set, that server is used and none is started. A worker that ends is started
    again. If GEOFM_NOTIFY_URL names a webhook, it gets a message when a run fails, from then on.

    Example: `geofm up --store /data/store --detach`, or with a machine for training, there:
    `geofm up --only gpu --store s3://bucket/geofm`
    """
    from flows.service.server import HOST, find_or_launch, hold_lock, wait_for
    from flows.service.workers import (
        PAGES_SERVER,
        keep_running,
        note_workers,
        place_of_workers,
        running_workers,
        start_detached,
    )
    from flows.settings import PAGES, open_place, take_notify_url

    webhook = take_notify_url()
    if host:
        os.environ[HOST] = host

    def tell(line: str) -> None:
        out.print(line, highlight=False)

    place = open_place(store, catalog)
    tell(f"store       {place.store.url}")
    server = find_or_launch()
    tell(f"Prefect     {server.ui}, starting" if server.pid else f"Prefect     {server.ui}")
    wait_for(server)
    from flows.deployments import deploy_all
    from flows.gpu import CPU_POOL, GPU_POOL
    from flows.service.pages import listen_for_pages, pages_password

    # No deployment has an address: the worker gets them from the environment. That of the catalogue
    # may hold a password, and Prefect stores parameters.
    os.environ["GEOFM_STORE"], os.environ["GEOFM_CATALOG"] = place.store.url, place.catalogue.url
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "geofm")
    # the forms are those of the machine that starts their runs
    deploy_all(tell, webhook, update=only != "gpu")
    tell(f"Prefect     {server.ui}")
    if server.pid:
        tell("password    `geofm env` prints it; the UI asks once per browser")
    pools = [pool for pool in (CPU_POOL, GPU_POOL) if pool.endswith(only or "")]
    where = place_of_workers(server, place.store.url, place.catalogue.url, pools)
    kept = list(pools)
    with ExitStack() as stack:
        with hold_lock("worker.lock"):
            if note := running_workers(where, tell):
                tell(f"reports     {note.get('pages') or 'where the pool geofm-cpu works'}")
                tell(f"workers     pid {note['pid']}, already running")
                raise typer.Exit(0 if detach else 2)
            if CPU_POOL in pools:  # where reports are written
                stack.enter_context(listen_for_pages())
                where["pages"] = os.environ[PAGES]
                kept.append(PAGES_SERVER)
                tell(f"reports     {where['pages']}, with {pages_password()}")
            names = " and ".join(pools)
            if detach:
                log = place.store.local_root / "worker.log"
                pid = start_detached(kept, log)
                note_workers(pid, where)
                tell(f"workers     pid {pid}, of {names}, log {log}")
                return
            tell(f"workers     of {names}")
            note_workers(os.getpid(), where)
        err.print("They run until Ctrl-C; the Prefect server stays until `geofm down`.")
        keep_running(kept, tell)


def down() -> None:
    """Stop the Prefect server that geofm started, and the workers."""
    from flows.service.server import stop_server
    from flows.service.workers import stop_workers

    workers, server = stop_workers(), stop_server()
    out.print("stopped" if workers or server else "no server that geofm started is running")


def env(json_: Json = False) -> None:
    """Print the address and the password of the Prefect server, as variables for a shell.

    Example: `eval "$(geofm env)"`, then `prefect flow-run ls`
    """
    from flows.service.server import client_variables

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
