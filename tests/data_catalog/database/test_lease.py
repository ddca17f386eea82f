"""One at a time: real processes on SQLite and on PostgreSQL, waiting, dying and falling silent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, update
from sqlalchemy.exc import OperationalError

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database import lease as lease_module
from data_catalog.database.lease import CatalogueAway, LeaseHeld, LeaseLost, hold_lease
from data_catalog.database.schema import LeaseRow
from data_catalog.progress import listen
from data_catalog.storage.process import is_gone, process_mark
from tests.data_catalog.helpers import NO_STORE

#: Holds the lease, says so, and keeps it until a file appears.
HOLDER = """
import sys, time
from pathlib import Path
from data_catalog.catalogue import open_catalogue
from tests.data_catalog.helpers import NO_STORE
url, log, stop = sys.argv[1:]
with open_catalogue(url, NO_STORE).lease("corpus"):
    with open(log, "a") as file:
        file.write("begin\\n")
    while not Path(stop).exists():
        time.sleep(0.02)
    with open(log, "a") as file:
        file.write("end\\n")
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("postgres_url")
        return found
    return f"sqlite:///{tmp_path}/leases.db"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(url: str, log: Path, tmp_path: Path) -> Iterator:
    """Start a process that wants the lease; what is left of them ends with the test."""
    running: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLDER, url, str(log), str(tmp_path / "stop")]
        running.append(subprocess.Popen(command))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def wait_for(log: Path, lines: list[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().split() == lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{log.read_text() if log.exists() else ''} is not {lines}")


def test_the_second_waits_and_says_for_whom(url: str, log: Path, start, tmp_path: Path) -> None:
    first = start()
    wait_for(log, ["begin"])
    catalogue = open_catalogue(url, NO_STORE)
    with pytest.raises(LeaseHeld, match=rf"'corpus' .* process {first.pid} on .* --no-wait"):
        catalogue.lease("corpus", wait=False).__enter__()
    with catalogue.lease("another", wait=False):
        pass
    notes: list[str] = []

    def listener(what: str, done: int, total: int, note: str) -> None:
        notes.append(note)
        (tmp_path / "stop").touch()

    with listen(listener), catalogue.lease("corpus"):
        assert log.read_text().split() == ["begin", "end"]
    assert f"process {first.pid} on" in notes[0]
    assert notes[-1] == "over"
    assert first.wait(10) == 0
    with catalogue.lease("corpus", wait=False):  # given back
        pass


def test_two_processes_never_hold_it_at_once(log: Path, start, tmp_path: Path) -> None:
    processes = [start(), start(), start()]
    wait_for(log, ["begin"])
    (tmp_path / "stop").touch()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text().split() == ["begin", "end"] * 3


def test_a_killed_holder_is_followed_at_once(url: str, log: Path, start) -> None:
    process = start()
    wait_for(log, ["begin"])
    os.kill(process.pid, signal.SIGKILL)  # not waited for: a zombie holds nothing either
    with hold_lease(open_catalogue(url, NO_STORE).engine, "corpus", expiry_s=1e6):
        pass
    assert process.wait(10) == -signal.SIGKILL


def elsewhere(catalogue: Catalogue) -> None:
    """Make the holder a process of another machine, of which nothing can be told."""
    with catalogue.session() as session:
        session.execute(update(LeaseRow).values(host="elsewhere", process="other/pid:[1]/7/7"))


def test_a_silent_holder_elsewhere_is_followed_after_a_while_and_finds_out(
    url: str, log: Path, start, tmp_path: Path
) -> None:
    catalogue = open_catalogue(url, NO_STORE)
    with hold_lease(catalogue.engine, "corpus", beat_s=1e6) as silent:  # no heartbeat is written
        elsewhere(catalogue)
        silent.confirm()
        with hold_lease(catalogue.engine, "corpus", expiry_s=1) as other:
            other.confirm()
            with pytest.raises(LeaseLost, match="nothing was published"):
                silent.confirm()
        with catalogue.lease("corpus", wait=False):  # what the silent one had is gone
            pass
    assert silent.holder != other.holder


def test_a_renewed_lease_is_kept(url: str) -> None:
    catalogue = open_catalogue(url, NO_STORE)
    with hold_lease(catalogue.engine, "corpus", beat_s=0.1):
        elsewhere(catalogue)
        time.sleep(2.5)  # PostgreSQL's clock is fine, SQLite's counts whole seconds
        with (
            pytest.raises(LeaseHeld),
            hold_lease(catalogue.engine, "corpus", wait=False, expiry_s=1.5),
        ):
            pass


def test_a_heartbeat_that_only_looks_old_keeps_the_lease(url: str) -> None:
    """After a machine has slept, or the catalogue was away, every heartbeat is old."""
    catalogue = open_catalogue(url, NO_STORE)
    with hold_lease(catalogue.engine, "corpus", beat_s=1) as lease:
        elsewhere(catalogue)
        long_ago = datetime.now(UTC) - timedelta(hours=8)
        with catalogue.session() as session:
            session.execute(update(LeaseRow).values(beat=long_ago))
        with (
            pytest.raises(LeaseHeld),
            hold_lease(catalogue.engine, "corpus", wait=False, expiry_s=30),
        ):
            pass
        lease.confirm()


def test_a_catalogue_that_was_away_costs_no_lease(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LOOK_S", 0.1)
    with outage(postgres_url) as (url, cut):
        here, there = open_catalogue(url, NO_STORE), open_catalogue(postgres_url, NO_STORE)
        with hold_lease(here.engine, "corpus", beat_s=0.2) as lease:
            elsewhere(there)
            with cut(3):  # longer than the lease is valid below
                pass
            lease.confirm()
            with (
                pytest.raises(LeaseHeld),
                hold_lease(there.engine, "corpus", wait=False, expiry_s=2),
            ):
                pass
            with cut(2):
                lease.confirm()  # waits for the catalogue
        with hold_lease(there.engine, "corpus", wait=False):
            pass


def test_a_catalogue_that_stays_away_is_an_error_of_its_own(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LOOK_S", 0.1)
    monkeypatch.setattr(lease_module, "AWAY_S", 0.5)
    with outage(postgres_url) as (url, cut):
        catalogue = open_catalogue(url, NO_STORE)
        with cut(60), pytest.raises(CatalogueAway, match=r"has not answered for .* run again"):
            catalogue.lease("corpus").__enter__()


def test_a_process_that_waited_through_an_outage_watches_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder can't renew its lease in an outage, so it must have time for that afterwards."""
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/c.db", NO_STORE)
    looks: list[float] = []
    take = lease_module._take

    def look(*args: Any) -> Any:
        looks.append(time.monotonic())
        if 2 < len(looks) < 8:  # away for longer than the lease is valid and than it is watched
            raise OperationalError("select", {}, ConnectionError("the catalogue is away"))
        if len(looks) == 8:  # the catalogue is back, and every heartbeat is old
            with catalogue.session() as session:
                session.execute(update(LeaseRow).values(beat=datetime(2020, 1, 1, tzinfo=UTC)))
        return take(*args)

    monkeypatch.setattr(lease_module, "LOOK_S", 0.2)
    with hold_lease(catalogue.engine, "corpus", beat_s=1e6):
        elsewhere(catalogue)
        monkeypatch.setattr(lease_module, "_take", look)
        with catalogue.session() as session:
            session.execute(update(LeaseRow).values(beat=datetime(2020, 1, 1, tzinfo=UTC)))
        with hold_lease(catalogue.engine, "corpus", beat_s=0.4, expiry_s=1):
            assert time.monotonic() - looks[7] >= 0.8, "it took the lease just after the outage"


@contextmanager
def outage(url: str) -> Iterator[tuple[str, Callable[[float], AbstractContextManager[None]]]]:
    """A catalogue behind a proxy: its address, and a function that cuts it off for some seconds."""
    target = make_url(url)
    away = threading.Event()
    pairs: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while (data := source.recv(65536)) and not away.is_set():
                sink.sendall(data)
        source.close()
        sink.close()

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                if away.is_set():
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", target.port or 5432))
                pairs.extend((client, server))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    @contextmanager
    def cut(seconds: float) -> Iterator[None]:
        away.set()
        while pairs:
            with suppress(OSError):
                pairs.pop().shutdown(socket.SHUT_RDWR)
        timer = threading.Timer(seconds, away.clear)
        timer.start()
        try:
            yield
        finally:
            timer.cancel() if seconds > 30 else timer.join()
            away.clear()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        yield target.set(port=port).render_as_string(hide_password=False), cut
        listener.shutdown(socket.SHUT_RDWR)


NAMES = ["", "a" * 64, "a" * 65, "a" * 66, "job " + "f" * 400, "ключ 钥匙", "nul \x00",
         "half \ud800", "it's; \"quoted\"\n", "%s {x} \\", " corpus", "corpus ", "Corpus",
         "corpus"]  # fmt: skip


def test_any_name_is_a_lease_of_its_own(url: str) -> None:
    catalogue = open_catalogue(url, NO_STORE)
    with ExitStack() as stack:
        leases = [stack.enter_context(catalogue.lease(name, wait=False)) for name in NAMES]
        for lease in leases:
            lease.confirm()
            with pytest.raises(LeaseHeld) as held:
                catalogue.lease(lease.name, wait=False).__enter__()
            assert repr(lease.name) in str(held.value)


def test_many_that_take_it_at_once_take_turns(url: str) -> None:
    inside: list[int] = []
    most: list[int] = []

    def turn() -> None:
        with hold_lease(open_catalogue(url, NO_STORE).engine, "corpus", beat_s=0.02):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=turn) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 5


def test_a_process_is_known_for_good() -> None:
    mine = process_mark()
    assert mine.split("/")[-2] == str(os.getpid())
    assert not is_gone(mine)
    assert is_gone(mine[:-1] + str((int(mine[-1]) + 1) % 10))  # the same pid, started otherwise
    assert not is_gone("other-boot/pid:[1]/1/1")  # nobody can tell
    assert not is_gone("")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    mark = process_mark(ended.pid)
    ended.wait(30)
    assert not mark or is_gone(mark)
    assert process_mark(ended.pid) == ""
