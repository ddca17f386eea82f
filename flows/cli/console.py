"""Output in the terminal: progress and log on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from data_catalog.progress import follow
from data_catalog.redaction import mask, printable

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def set_up_logging(verbose: bool) -> None:
    """Send log lines of geofm to stderr; with ``verbose`` those of all libraries."""
    handler = RichHandler(console=err, show_path=False, show_time=verbose, markup=False)
    if not verbose:  # lines of other libraries are in the UI and in the server's log
        handler.addFilter(lambda record: record.name.partition(".")[0] == "geofm")
    handler.addFilter(_Printable())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("geofm").setLevel(logging.DEBUG if verbose else logging.INFO)


class _Printable(logging.Filter):
    """Makes log lines printable, and masks secrets in addresses (urllib3 logs whole addresses)."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(mask(record.getMessage())), None
        return True


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show one progress bar per stage; plain lines if stderr is not a terminal."""
    with _bars() if err.is_terminal else _lines():
        yield


@contextmanager
def _bars() -> Iterator[None]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars: dict[str, TaskID] = {}
    lock = threading.Lock()
    with Progress(*columns, console=err) as progress:

        def show(stage: str, done: int, total: int, note: str) -> None:
            with lock:
                if stage not in bars:
                    bars[stage] = progress.add_task(stage, total=total, note=note)
                progress.update(
                    bars[stage], completed=done, total=total, note=escape(printable(note))
                )

        with follow(show):
            yield


@contextmanager
def _lines(every_s: float = 4.0) -> Iterator[None]:
    last: dict[str, float] = {}

    def show(stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done == total or now - last.get(stage, -every_s) >= every_s:
            last[stage] = now
            line = f"{stage:>10}  {done:,} of {total:,} {printable(note)}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    with follow(show):
        yield


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    out.print(table)


#: Fields that this command has printed with ``print_json`` so far.
_printed: dict[str, Any] = {}


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on one line of stdout."""
    _printed.update(value)
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_failure(message: str, kind: str, exit_code: int) -> None:
    """Print a failure as one JSON object, the last line of stdout.

    Fields that the command printed before it failed are repeated, such as the problems of
    ``verify``, so that a program needs to read only the last line.

    Args:
        message: the message on stderr: what happened, and the remedy.
        kind: name of the error's class.
        exit_code: exit code of the process.
    """
    print_json({**_printed, "error": printable(message), "kind": kind, "exit_code": exit_code})
