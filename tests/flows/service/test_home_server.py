"""Which server is this home's: secrets, notes, ports, strangers. Prefect itself is a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_catalog.errors import UsageError
from data_catalog.storage.process import process_mark
from flows.cli.main import app
from flows.service import home, serve, server, workers
from tests.flows.conftest import files_with_secret
from tests.flows.homes import Enter, start, status, stranger


def test_secret_and_notes_are_the_users_alone(enter: Enter, tmp_path: Path) -> None:
    folder = enter("home")
    folder.mkdir(mode=0o755)
    start()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = (folder / "server.auth").read_text()
    assert secret.startswith("geofm:") and len(secret) >= 40 and secret == home.auth_string()
    for name in ("server.auth", "server.json", "server.port"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert os.environ["PREFECT_API_AUTH_STRING"] == secret
    assert os.environ["PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"] == "true"
    assert files_with_secret(tmp_path) == []
    assert secret != (enter("other"), home.auth_string())[1]


@pytest.mark.parametrize("damage", ["open", "short", "empty", "blank", "binary", "link", "folder"])
def test_a_secret_that_others_may_know_is_replaced(
    enter: Enter, tmp_path: Path, damage: str
) -> None:
    folder = enter("home")
    before, path = home.auth_string(), folder / "server.auth"
    if damage == "open":
        path.chmod(0o644)
    elif damage == "link":
        (tmp_path / "elsewhere").write_text(before)
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(UsageError, match="GEOFM_HOME"):
            home.auth_string()
        return
    else:
        texts = {"short": b"geofm:1", "empty": b"", "blank": before[:-1].encode() + b" \n x"}
        path.write_bytes(texts.get(damage, b"geofm:\xff\xfe" + bytes(40)))
    after = home.auth_string()
    assert after != before and len(after) == len(before) == 49
    assert path.is_file() and not path.is_symlink() and after == home.auth_string()


def test_a_home_that_cannot_be_kept_private_is_refused(
    enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = enter("home")
    folder.write_text("a file")
    with pytest.raises(UsageError, match=r"GEOFM_HOME=.*set GEOFM_HOME"):
        server.find_or_launch()
    shared = enter("shared")
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(UsageError, match="other programs"):
        server.find_or_launch()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    enter("theirs").mkdir()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(UsageError, match="another user"):
        server.find_or_launch()
    monkeypatch.undo()
    outcome = CliRunner().invoke(app, ["down"], env={"GEOFM_HOME": str(folder)})
    assert isinstance(outcome.exception, UsageError)


@pytest.mark.parametrize(
    ("mode", "names", "closed"),
    [
        (0o755, [".bashrc", "Documents/"], False),
        (0o775, ["scenes/"], False),
        (0o755, ["server.json", "thesis.txt"], False),
        (0o710, ["prefect.toml"], False),
        (0o775, [], False),
        (0o757, [], False),
        (0o755, [], True),
        (0o775, ["server.json", "prefect/"], True),
        (0o755, ["server.auth", "server.port", "server.log", "server.lock", "worker.pid"], True),
        (0o755, [".server.json.12.0a1b2c3d"], True),
        (0o700, ["thesis.txt"], True),
    ],
)
def test_a_folder_of_other_things_keeps_its_mode(
    enter: Enter, mode: int, names: list[str], closed: bool
) -> None:
    folder = enter("home")
    folder.mkdir()
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    folder.chmod(mode)
    if closed:
        assert home.home() == folder
    else:
        with pytest.raises(home.HomeUnusable, match=r"other users.*set GEOFM_HOME to a folder of"):
            home.home()
    assert stat.S_IMODE(folder.stat().st_mode) == (0o700 if closed else mode)
    assert sorted(path.name for path in folder.iterdir()) == sorted(n.strip("/") for n in names)


#: Contents of server.json; `{...}` stand for a process that is not Prefect, and the home's mark.
NOTES = [
    "", "no json", "[]", "null", "7", '"text"', "{}", "[" * 100_000, '{"ui": 1, "pid": 2}',
    '{"ui": "http://127.0.0.1:4200"}',
    '{"ui": "http://127.0.0.1:4200", "pid": null}',
    '{"pid": PID}',
    *('{"ui": "http://127.0.0.1:4200", "pid": PIDS}'.replace("PIDS", pid)
      for pid in ("PID", "-1", "0", "1", "true", '"PID"', "4194305", "1e99", "9" * 40)),
    *(f'{{"ui": {ui}, "pid": PID, "mark": "{mark}", "host": "127.0.0.1", "home": "HOME"}}'
      for ui, mark in (('"URL"', ""), ('"URL"', "x/1/2"), ('"URL"', "GONE"), ('"ftp://x"', "GONE"),
                   ('"http://127.0.0.1:99999"', ""), ('"http://[::1"', ""), ("[]", "MARK"))),
    '{"ui": "URL", "pid": PID, "mark": "MARK", "host": "127.0.0.1", "home": "1:2"}',
    '{"ui": "URL", "pid": PID, "mark": "MARK", "home": "HOME", "more": 1}',
]  # fmt: skip


def test_a_note_that_names_no_server_of_this_home_leads_to_a_new_server(enter: Enter) -> None:
    folder = enter("home")
    folder.mkdir(mode=0o700)
    mark = process_mark(os.getpid())
    with stranger() as (url, heard):
        for note in NOTES:
            for name, value in {
                "PID": str(os.getpid()), "MARK": mark, "GONE": f"{mark}9", "URL": url,
                "HOME": home.home_mark(),
            }.items():  # fmt: skip
                note = note.replace(name, value)  # noqa: PLW2901
            (folder / "server.json").write_text(note)
            assert server.running_server() is None, note
            assert not server.stop_server(), "and this process is not ended"
            (folder / "server.json").write_text(note)
        started = start()
        assert started.ui != url and started.alive
        assert status(f"{started.ui}/docs") == 401
        assert status(f"{started.ui}/docs", home.auth_string()) == 200
        assert all("Authorization" not in headers for headers in heard)


def test_a_taken_port_is_another_port_and_the_port_stays(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = enter("home")
    first = start()
    assert server.stop_server() and not first.alive
    assert start().ui == first.ui, "the browser keeps the password per address"
    assert server.stop_server()
    with stranger(int(first.ui.rpartition(":")[2])) as (url, heard):
        assert url == first.ui
        second = start()
        assert second.ui != first.ui and second.alive
    assert heard == []
    (folder / "server.port").write_text('{"port": 70000}')
    server.stop_server()
    assert start().alive


def test_a_relayed_answer_is_no_proof(enter: Enter) -> None:
    enter("home")
    started = start()

    class Relay(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = httpx.get(started.ui + self.path, headers=dict(self.headers), trust_env=False)
            self.send_response(200)
            self.send_header(serve.PROOF_HEADER, answer.headers[serve.PROOF_HEADER])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    relay = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    thread = threading.Thread(target=relay.serve_forever)
    thread.start()
    far = server.Server(f"http://127.0.0.1:{relay.server_port}", 4_000_000, "boot/4000000/1")
    with pytest.raises(server.NoServer, match="is not the Prefect server of"):
        server.wait_for(far)
    relay.shutdown()
    thread.join()
    relay.server_close()


def test_two_homes_at_once_have_each_their_own_server(enter: Enter, tmp_path: Path) -> None:
    code = (
        "import json; from flows.service import serve, server; "
        f"serve.__file__ = {serve.__file__!r}; server.wait_for(server.find_or_launch()); "
        "print(json.dumps(server.client_variables()))"
    )
    homes = [enter(f"home{k}") for k in range(3)]
    homes += homes[:1]  # one of them twice: one server
    processes = []
    for folder in homes:
        environment = {**os.environ, "GEOFM_HOME": str(folder)}
        command = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    told = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert told[3] == told[0]
    assert len({t["PREFECT_API_URL"] for t in told}) == 3
    secrets = [t["PREFECT_API_AUTH_STRING"] for t in told]
    for k, one in enumerate(told[:3]):
        docs = one["PREFECT_API_URL"].removesuffix("api") + "docs"
        assert [status(docs, secrets[j]) == 200 for j in range(3)] == [j == k for j in range(3)]
    enter("home0")
    assert server.stop_server()
    assert not server.stop_server()
    for k in (1, 2):
        enter(f"home{k}")
        assert server.client_variables() == told[k]


def test_a_copied_home_does_not_own_the_original_server(enter: Enter) -> None:
    original = enter("home")
    first = start()
    shutil.copytree(original, original.with_name("copy"))
    enter("copy")
    assert server.running_server() is None and not server.stop_server()
    assert first.alive
    shutil.copy(original / "server.json", original.with_name("copy"))
    second = start()
    assert second.ui != first.ui
    assert server.stop_server() and first.alive
    enter("home")
    assert start() == first


def test_a_server_with_another_secret_is_replaced(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = enter("home")
    first = start()
    before = (folder / "server.auth").read_text()
    (folder / "server.auth").unlink()
    monkeypatch.delenv("PREFECT_API_URL")
    second = start()
    assert not first.alive and second.alive
    after = (folder / "server.auth").read_text()
    docs = f"{second.ui}/docs"
    assert (status(docs, before), status(docs, after)) == (401, 200)


def test_the_server_of_an_earlier_version_is_refused_with_the_remedy(enter: Enter) -> None:
    folder = enter("home")
    folder.mkdir(mode=0o700)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
    old = subprocess.Popen([*sleep, "prefect", "server"], env=environment, start_new_session=True)
    address = {"PREFECT_API_URL": "http://127.0.0.1:4999/api"}
    worker = subprocess.Popen(
        [*sleep, "prefect", "worker"], env={**os.environ, **address}, start_new_session=True
    )
    try:
        note = json.dumps({"ui": "http://127.0.0.1:4999", "pid": old.pid})
        other = enter("other")
        other.mkdir(mode=0o700)
        (other / "server.json").write_text(note)  # in another home it is a stranger
        assert server.running_server() is None and not server.stop_server()
        assert old.poll() is None
        enter("home")
        (folder / "server.json").write_text(note)
        (folder / "worker.pid").write_text(str(worker.pid))
        # a process has no command line for a moment after it was started
        while not Path(f"/proc/{worker.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        with pytest.raises(UsageError, match=r"earlier version.*geofm down"):
            server.find_or_launch()
        assert workers.stop_workers() and worker.wait(5) == -signal.SIGTERM
        assert server.stop_server() and old.wait(5) == -signal.SIGTERM
        assert start().alive
    finally:
        old.kill()
        worker.kill()


def test_a_worker_is_ended_only_by_its_own_home(enter: Enter) -> None:
    folder = enter("home")
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    worker = subprocess.Popen(command, start_new_session=True)
    try:
        workers.note_workers(worker.pid, {})
        shutil.copytree(folder, folder.with_name("copy"))
        enter("copy")
        assert not workers.stop_workers()
        enter("home")
        note = json.loads((folder / "worker.pid").read_text())
        (folder / "worker.pid").write_text(json.dumps({**note, "mark": f"{note['mark']}9"}))
        assert not workers.stop_workers() and worker.poll() is None
        for damaged in ("", "x", "-1", "1", "null", "[1]", json.dumps({**note, "pid": None})):
            (folder / "worker.pid").write_text(damaged)
            assert not workers.stop_workers() and worker.poll() is None
        workers.note_workers(worker.pid, {})
        assert workers.stop_workers() and worker.wait(5) == -signal.SIGTERM
    finally:
        worker.kill()


def test_a_server_that_ends_while_it_starts_is_reported_at_once(
    enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("home")
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such database')")
    monkeypatch.setattr(serve, "__file__", str(broken))
    begin = time.monotonic()
    with pytest.raises(server.NoServer, match=r"ended while it started.*server\.log"):
        start()
    assert time.monotonic() - begin < 20
    assert "no such database" in (tmp_path / "home" / "server.log").read_text()


def test_a_server_in_another_container_is_used_but_not_ended(enter: Enter) -> None:
    folder = enter("home")
    started = start()
    note = json.loads((folder / "server.json").read_text())
    elsewhere = {**note, "pid": os.getpid(), "mark": f"other-boot/pid:[1]/{os.getpid()}/1"}
    (folder / "server.json").write_text(json.dumps(elsewhere))
    assert start().ui == started.ui
    with pytest.raises(UsageError, match="another container"):
        server.stop_server()
    assert (folder / "server.json").exists() and started.alive
    (folder / "server.json").write_text(json.dumps(note))


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.data())
def test_no_damage_to_the_notes_is_a_traceback(enter: Enter, data: st.DataObject) -> None:
    folder = enter("home")
    mark = f"{process_mark().rpartition('/')[0]}/7"
    whole = json.dumps(
        {"ui": "http://127.0.0.1:9", "pid": 4_000_000, "mark": mark,
         "host": "127.0.0.1", "home": home.home_mark()}
    ).encode()  # fmt: skip
    for name in ("server.json", "server.port", "worker.pid", "server.auth"):
        changed = bytearray(whole)
        for _ in range(data.draw(st.integers(0, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        (folder / name).write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    assert server.running_server() is None
    assert not workers.stop_workers()
    assert not server.stop_server()
    server.listen("127.0.0.1").close()
