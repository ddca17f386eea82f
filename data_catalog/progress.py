"""Progress: stages report their progress, a terminal or a server shows it.

tick, advance     report steps of a stage's work, and finished rows of a part
say               report on something that is no stage's work, such as waiting for another run
StageProgress     sums up the reports on one stage: rows, parts, rate, time left
listen            hear every report
follow            hear at most one line about each stage every few seconds

A stage does not depend on how its progress is shown. A stage is never silent: its line is repeated
even if nothing was finished meanwhile. Work that is asked to stop ends where it reports
(data_catalog/stopping.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TypeVar

from data_catalog.stopping import end_if_asked

Listener = Callable[[str, int, int, str], None]
Watcher = Callable[[str, int, Mapping[str, float]], None]
_listeners: list[Listener] = []
_followers: list[Listener] = []
_watchers: list[Watcher] = []
_Hearer = TypeVar("_Hearer")
_lock = threading.Lock()

#: Seconds between two lines about a stage.
EVERY_S = 5.0
#: Parts that are looked up in the store before each line.
LOOKED_UP = 64


def tick(what: str, done: int, total: int, note: str = "") -> None:
    """Report to the listeners of this process that ``done`` of ``total`` steps are finished.

    Args:
        what: Name of the work, e.g. a stage.
        done: Finished steps.
        total: All steps.
        note: Unit of the steps, or a short remark.

    Raises:
        Stopped: The work is to stop.
    """
    stage = _own_stage()
    if stage is None:
        say(what, done, total, note)
        return
    _hear(what, done, total, note)
    stage.step(what, done, total, note)


def say(what: str, done: int, total: int, note: str = "") -> None:
    """Report on something that is no stage's work, whatever stages are running.

    Args:
        what: Name of it.
        done: Finished steps.
        total: All steps.
        note: A short remark.

    Raises:
        Stopped: The work is to stop.
    """
    _hear(what, done, total, note)
    _tell(what, done, total, note)


def report_values(what: str, step: int, values: Mapping[str, float]) -> None:
    """Report numbers of one step to the watchers of this process.

    Args:
        what: Name of the work, e.g. a stage.
        step: Number of the step, from 0.
        values: The numbers by name, e.g. the loss.
    """
    for watcher in tuple(_watchers):
        watcher(what, step, values)


def _hear(what: str, done: int, total: int, note: str) -> None:
    """End the work if it is to stop, else pass a report to the listeners."""
    end_if_asked()
    for listener in tuple(_listeners):
        listener(what, done, total, note)


def advance(rows: int) -> None:
    """Report that rows of a part are finished, while the part is being worked on.

    Raises:
        Stopped: The work is to stop.
    """
    end_if_asked()
    stage = _own_stage()
    if stage is not None:
        stage.advance(rows)


def _own_stage() -> StageProgress | None:
    """Return the stage that the caller works for.

    Threads that a stage starts without its context belong to the stage that began last.
    """
    stage = _current.get()
    if stage is not None:
        return stage
    running = tuple(_stages)
    return running[-1] if running else None


def _tell(what: str, done: int, total: int, note: str) -> None:
    """Pass a line to the followers."""
    for follower in tuple(_followers):
        follower(what, done, total, note)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call ``listener(what, done, total, note)`` on every tick while the block runs."""
    with _registered(_listeners, listener):
        yield


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher(what, step, values)`` on the numbers of every step while the block runs."""
    with _registered(_watchers, watcher):
        yield


@contextmanager
def follow(follower: Listener) -> Iterator[None]:
    """Call ``follower(what, done, total, note)`` on lines of progress while the block runs.

    Of a stage, ``done`` never falls, and there is at most one line every ``EVERY_S`` seconds.
    """
    with _registered(_followers, follower):
        yield


@contextmanager
def _registered(listeners: list[_Hearer], listener: _Hearer) -> Iterator[None]:
    with _lock:
        listeners.append(listener)
    try:
        yield
    finally:
        with _lock:
            listeners.remove(listener)


class StageProgress:
    """Progress of one stage, from its plan to its seal.

    Args:
        name: Name of the stage.
        unit: What the rows of its parts are, in the plural.
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name, self._unit = name, unit
        self._lock = threading.Lock()
        self._started = self._phase_started = time.monotonic()
        self._phase = "planning"
        self._step = ""
        self._own_step = (0, 0)
        self._rows: list[int] = []
        self._pending: list[tuple[str, int]] = []
        self._is_finished: Callable[[str], bool] = lambda _: False
        self._rows_before = self._rows_of_parts = self._advanced = 0
        self._parts_done = 0
        self._shown = 0

    def begin(
        self,
        parts: Sequence[tuple[str, int]],
        found: Container[str],
        is_finished: Callable[[str], bool],
    ) -> None:
        """Start the work on the parts.

        Args:
            parts: Key and number of rows of each part.
            found: Keys of the parts that were finished before.
            is_finished: ``is_finished(key)`` tells whether a part is in the store now, whichever
                process has worked on it.
        """
        counted = [(key, max(rows, 1)) for key, rows in parts]
        pending = [part for part in counted if part[0] not in found]
        with self._lock:
            self._rows = [rows for _, rows in counted]
            self._pending, self._is_finished = pending, is_finished
            self._parts_done = len(parts) - len(pending)
            self._rows_before = sum(self._rows) - sum(rows for _, rows in pending)
            self._phase, self._step = "", ""
            self._phase_started = time.monotonic()

    def seal(self) -> None:
        """Start the seal: all parts are finished."""
        with self._lock:
            self._rows_of_parts = sum(self._rows) - self._rows_before
            self._parts_done, self._pending = len(self._rows), []
            self._phase, self._step = "sealing", ""
            self._phase_started = time.monotonic()

    def step(self, what: str, done: int, total: int, note: str) -> None:
        """Note a tick within the stage, for the next line."""
        with self._lock:
            # a stage without parts, such as a training, counts the steps of its seal
            if what == self._name and self._phase == "sealing" and not self._rows:
                self._own_step, self._step = (done, total), note
            else:
                name = "" if what == self._name else f"{what} "
                self._step = f"{name}{done:,} of {total:,} {note}".rstrip()

    def advance(self, rows: int) -> None:
        """Note rows of a part that is being worked on in this process."""
        with self._lock:
            self._advanced += rows

    def tell(self) -> None:
        """Pass a line to the followers."""
        self._look_up_parts()
        with self._lock:
            line = self._line()
        _tell(self._name, *line)

    def _look_up_parts(self) -> None:
        """Look up the next parts: other processes may have finished them."""
        with self._lock:
            pending = self._pending[:LOOKED_UP]
        finished = {key for key, _ in pending if self._is_finished(key)}
        with self._lock:
            self._parts_done += len(finished)
            self._rows_of_parts += sum(rows for key, rows in self._pending if key in finished)
            self._pending = [part for part in self._pending if part[0] not in finished]

    def _line(self) -> tuple[int, int, str]:
        """Return finished rows, all rows, and the rest of the line."""
        in_phase = time.monotonic() - self._phase_started
        if self._own_step[1]:
            done, total = self._own_step
            self._shown = max(self._shown, done)
            return self._shown, total, f"steps, {self._step}"
        total, parts = sum(self._rows), len(self._rows)
        since = max(self._rows_of_parts, self._advanced)
        self._shown = max(self._shown, min(self._rows_before + since, total))
        notes = []
        if parts:
            counts_rows = total > parts
            notes = [self._unit if counts_rows else "parts"]
            notes += [f"{self._parts_done:,} of {parts:,} parts"] if counts_rows else []
        if self._phase:
            notes.append(f"{self._phase} for {_minutes(in_phase)}")
        elif since and in_phase > 0:
            rate = since / in_phase
            notes.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            notes.append(f"{_minutes((total - self._shown) / rate)} left")
        notes += [self._step] if self._step and (self._phase or not since) else []
        return self._shown, max(total, 1), ", ".join(notes)

    def end(self) -> None:
        """Pass the last line to the followers."""
        total = max(sum(self._rows), 1)
        took = f"done in {_minutes(time.monotonic() - self._started)}"
        unit = [self._unit] if sum(self._rows) > len(self._rows) else []
        _tell(self._name, total, total, ", ".join([*unit, took]))


#: Stages of this process that are running, the one that began last at the end.
_stages: list[StageProgress] = []
#: The stage that a thread works for.
_current: ContextVar[StageProgress | None] = ContextVar("geofm_stage", default=None)


@contextmanager
def report_stage(name: str, unit: str) -> Iterator[StageProgress]:
    """Report on a stage while the block runs, at least every ``EVERY_S`` seconds."""
    progress = StageProgress(name, unit)
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(EVERY_S):
            progress.tell()

    with _lock:
        _stages.append(progress)
    # followers find the settings of the caller, such as the address of a server
    reporter = threading.Thread(
        target=copy_context().run, args=(repeat,), name="geofm-progress", daemon=True
    )
    reporter.start()
    token = _current.set(progress)
    try:
        yield progress
        progress.end()
    finally:
        _current.reset(token)
        ended.set()
        reporter.join()
        with _lock:
            _stages.remove(progress)


def _minutes(seconds: float) -> str:
    """Write a duration: 8 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
