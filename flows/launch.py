"""Run a recipe from the terminal: start the server, run the flow, print the summary."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import typer

from data_catalog.progress import say
from flows.cli.console import err, out, print_json, print_table, progress_bars
from flows.preflight import check_once
from flows.service.server import find_or_launch, wait_for
from geofm.config.recipe_book import load_recipe
from geofm.forecasting.figures import COMPARED


def launch(
    name: str,
    overrides: list[str],
    store: str,
    catalog: str,
    json_: bool,
    data_only: bool,
    wait: bool = True,
    dataset: str = "",
) -> None:
    """Run a recipe and print its result.

    Args:
        name: name of a recipe, or a YAML file.
        overrides: changes of the recipe, as ``section.field=value``.
        store: store address, or empty.
        catalog: catalogue address, or empty.
        json_: print one JSON object instead of the tables.
        data_only: end with the dataset (stage ``pack``).
        wait: wait while another run refreshes the same dataset or trains the same model.
        dataset: published dataset to train on, without a search; empty: refresh it first.
    """
    from flows.settings import HEARTBEAT_S, NO_WAIT, open_place
    from flows.versions import published_dataset

    started = time.perf_counter()
    recipe = load_recipe(name, overrides)
    place = open_place(store, catalog)
    if dataset:
        published_dataset(place.catalogue, dataset)
    check_once(recipe, place, data_only, keep=True)
    # The terminal shows progress bars; log lines of Prefect and geofm go to the UI.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "geofm")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = HEARTBEAT_S
    server = find_or_launch()
    # The address may hold a password, and the UI shows parameters: it is passed in the environment.
    os.environ["GEOFM_STORE"], os.environ["GEOFM_CATALOG"] = place.store.url, place.catalogue.url
    os.environ[NO_WAIT] = "" if wait else "1"
    with progress_bars():
        say("server", 0, 1, "starting Prefect" if server.pid else "")
        wait_for(server)
        say("server", 1, 1, server.ui)
        from flows.pipeline import pretrain_flow, refresh_flow, report_page
        from flows.summary import PipelineRun, run_counts, score_rows, summary_rows

        try:
            with _sigterm_interrupts():
                if data_only:
                    run = cast(PipelineRun, refresh_flow(str(name), changes=overrides))
                else:
                    run = pretrain_flow(str(name), dataset=dataset, changes=overrides)
        except KeyboardInterrupt:
            err.print("[bold]stopped[/]; give the same command again to continue")
            raise typer.Exit(130) from None
    seconds = time.perf_counter() - started
    page = report_page(run)
    if json_:
        print_json(
            {
                "artifacts": {stage: artifact.digest for stage, artifact in run.artifacts.items()},
                "counts": run_counts(run),
                **(run.version.to_json() if run.version else {}),
                **({"model": run.model.to_json()["version"]} if run.model else {}),
                "forecast": [entry.to_json() for entry in run.comparison()],
                "seconds": round(seconds, 2),
                "ui": server.ui,
                "report": str(page) if page else None,
            }
        )
        return
    print_table(
        f"{recipe.name}: {seconds:.0f} s", ["what", ""], [list(r) for r in summary_rows(run)]
    )
    if compared := run.comparison():
        rows = [list(entry.cells()) for entry in compared]
        print_table("Forecast and what came", list(COMPARED), rows)
    scores = score_rows(run.artifacts.get("evaluate"))
    if scores:
        rows = [
            [s["model"], s["feature"], s["task"], s["protocol"],
             f"{s['value']:.3f}", f"{s['ci_low']:.3f} to {s['ci_high']:.3f}", str(s["n"])]
            for s in scores
        ]  # fmt: skip
        columns = ["model", "feature", "task", "protocol", "score", "95 % interval", "n"]
        print_table("Scores", columns, rows)
    if page:
        out.print(f"report   {page}", highlight=False)
    out.print(f"Prefect  {server.ui}", highlight=False)
    if server.pid:
        err.print(
            "The Prefect server keeps running; `geofm down` stops it, and `geofm env` prints the "
            "password of its UI.",
            highlight=False,
        )


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: the training writes its checkpoint first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
