"""How a server is reached: shells, proxies, other interfaces, a server of the user's own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_catalog.errors import UsageError
from flows.cli.main import app
from flows.service import home, serve, server
from tests.flows.homes import Enter, start, stranger


def test_a_server_that_is_open_does_not_start() -> None:
    from prefect import settings as prefect

    closed = {
        prefect.PREFECT_SERVER_API_AUTH_STRING: "a:b",
        prefect.PREFECT_SERVER_CSRF_PROTECTION_ENABLED: True,
        prefect.PREFECT_SERVER_CORS_ALLOWED_ORIGINS: "http://localhost:4200",
    }
    opened: tuple[Any, ...] = ("", False, "http://localhost:4200,*")
    for setting, value in zip(closed, opened, strict=True):
        with (
            prefect.temporary_settings({**closed, setting: value}),
            pytest.raises(
                SystemExit, match=f"^{setting.name.replace('SERVER_C', 'SERVER_API_C')} "
            ),
        ):
            serve.main([])


@pytest.mark.parametrize("others", ["", "intranet.example", "*"])
def test_a_proxy_does_not_cut_us_off(
    enter: Enter, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    enter("home")
    with stranger() as (proxy, heard):
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("NO_PROXY", others)
        started = start()
        code = "import httpx, os; print(httpx.get(os.environ['A'], timeout=5).text)"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "A": f"{started.api}/health"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "true" and heard == []
        exported = server.client_variables()
    assert "NO_PROXY" in exported
    assert exported["NO_PROXY"].split(",")[0] == (others or "127.0.0.1")


def test_geofm_env_is_for_a_shell(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    enter("home")
    none = CliRunner().invoke(app, ["env"])
    assert isinstance(none.exception, server.NoServer) and none.exception.exit_code == 3
    assert "geofm up" in str(none.exception) and none.stdout == ""
    started = start()
    line = CliRunner().invoke(app, ["env"]).stdout
    expected = [started.api, home.auth_string()]
    assert line == "export PREFECT_API_URL={} PREFECT_API_AUTH_STRING={}\n".format(*expected)
    show = 'eval "$1"; printf "%s\n" "$PREFECT_API_URL" "$PREFECT_API_AUTH_STRING"'

    def evaluated(text: str) -> list[str]:
        command = ["sh", "-c", show, "sh", text]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={})
        return done.stdout.splitlines()

    assert evaluated(line) == expected
    assert json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout) == {
        "PREFECT_API_URL": expected[0], "PREFECT_API_AUTH_STRING": expected[1],
    }  # fmt: skip
    # what it set in a shell does not make the home's own server a configured one
    assert server.configured_server() == {} and start() == started
    for host in ("127.0.0.1", "localhost"):  # set by hand, as before there was a secret
        monkeypatch.delenv("PREFECT_API_AUTH_STRING")
        monkeypatch.setenv("PREFECT_API_URL", started.api.replace("127.0.0.1", host) + "/")
        assert server.configured_server() == {} and start() == started
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    assert server.configured_server() == {"PREFECT_API_URL": "http://127.0.0.1:1/api"}
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", home.auth_string())
    server.stop_server()
    assert start().alive
    odd = 'me:it\'s $(id) `id` \\ "x" & ; *'
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api/")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", odd)
    line = CliRunner().invoke(app, ["env"]).stdout
    assert evaluated(line) == ["https://prefect.example/api", odd]


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_shell_with_the_secret_before_finds_the_home_s_server(
    enter: Enter, monkeypatch: pytest.MonkeyPatch, running: bool, host: str
) -> None:
    folder = enter("home")
    first = start()
    shell = server.client_variables()
    shell["PREFECT_API_URL"] = shell["PREFECT_API_URL"].replace("127.0.0.1", host)
    if not running:
        server.stop_server()
    (folder / "server.auth").unlink()
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    second = start()
    assert second.alive and second.pid != first.pid
    new = (folder / "server.auth").read_text()
    assert new != shell["PREFECT_API_AUTH_STRING"]
    assert os.environ["PREFECT_API_AUTH_STRING"] == new
    monkeypatch.setenv("PREFECT_API_URL", second.api.replace("127.0.0.1", host))
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", shell["PREFECT_API_AUTH_STRING"])
    assert server.client_variables()["PREFECT_API_AUTH_STRING"] == new


def test_another_server_at_the_port_of_the_home_is_a_configured_one(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("home")
    first = start()
    server.stop_server()
    port = int(first.ui.rpartition(":")[2])
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "team:secret")
    for address in (f"http://127.0.0.1:{port + 1}", f"http://h.example:{port}"):
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        assert server.configured_server()["PREFECT_API_URL"] == f"{address}/api"
    with stranger(port):
        monkeypatch.setenv("PREFECT_API_URL", first.api)
        assert server.configured_server()["PREFECT_API_URL"] == first.api


@pytest.fixture
def team(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of a server with TLS and the secret ``team:secret``, and its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    authority, port = tmp_path / "authority.pem", 0
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", tmp_path / "key.pem", "-out", authority],
        check=True, capture_output=True,
    )  # fmt: skip

    class Team(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            right = "Basic " + base64.b64encode(b"team:secret").decode()
            self.send_response(200 if self.headers["Authorization"] == right else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", port), Team)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, tmp_path / "key.pem")
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield f"https://localhost:{listener.server_port}/api", authority
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_a_configured_server_is_asked_as_prefect_does(
    enter: Enter, team: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import settings as prefect

    enter("home")
    url, authority = team
    right = {
        prefect.PREFECT_API_URL: url,
        prefect.PREFECT_API_AUTH_STRING: "team:secret",
        prefect.PREFECT_API_SSL_CERT_FILE: str(authority),
    }
    wrong: list[tuple[dict[Any, Any], str]] = [
        ({prefect.PREFECT_API_AUTH_STRING: "team:guess"}, "refuses the credentials.*AUTH_STRING"),
        ({prefect.PREFECT_API_AUTH_STRING: None}, "refuses the credentials.*AUTH_STRING"),
        ({prefect.PREFECT_API_SSL_CERT_FILE: None}, "does not answer.*certificate"),
        ({prefect.PREFECT_API_SSL_CERT_FILE: "/no/such"}, "does not answer"),
        ({prefect.PREFECT_API_URL: "http://127.0.0.1:9/api"}, "does not answer.*PREFECT_API_URL"),
    ]
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # for others, not for loopback
    monkeypatch.setenv("PREFECT_API_URL", url)
    with prefect.temporary_settings(right):
        assert server.find_or_launch() == server.Server(url.removesuffix("/api"), 0)
    for change, message in wrong:
        monkeypatch.setenv("PREFECT_API_URL", change.get(prefect.PREFECT_API_URL, url))
        begin = time.monotonic()
        with (
            prefect.temporary_settings({**right, **change}),
            pytest.raises(server.NoServer, match=message),
        ):
            server.find_or_launch()
        assert time.monotonic() - begin < 30


def test_a_configured_server_is_found_with_its_credentials(
    enter: Enter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("home")
    assert server.configured_server() == {}
    profiles = tmp_path / "no-profiles" / "profiles.toml"
    profiles.parent.mkdir()
    profiles.write_text(
        'active = "team"\n[profiles.team]\nPREFECT_API_URL = "http://team/api"\n'
        'PREFECT_API_AUTH_STRING = "a:b"\n[profiles.other]\n'
    )
    team = {"PREFECT_API_URL": "http://team/api", "PREFECT_API_AUTH_STRING": "a:b"}
    assert server.configured_server() == team
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "c:d")
    assert server.configured_server() == {**team, "PREFECT_API_AUTH_STRING": "c:d"}
    monkeypatch.setenv("PREFECT_PROFILE", "other")
    assert server.configured_server() == {}
    for damaged in ("active = [", 'active = "x"\n[profiles]\nx = 1\n', "profiles = 3", "\0"):
        profiles.write_text(damaged)
        monkeypatch.delenv("PREFECT_PROFILE", raising=False)
        assert server.configured_server() == {}
    assert not (tmp_path / "home").exists(), "a team's server needs no home"


def test_a_server_listens_where_the_user_says(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("home")
    monkeypatch.setenv(server.HOST, "0.0.0.0")
    started = start()
    port = started.ui.rpartition(":")[2]
    assert started.ui == f"http://127.0.0.1:{port}" and started.host == "0.0.0.0"
    lines = Path(f"/proc/{started.pid}/environ").read_bytes().decode().split("\0")
    variables = dict(line.partition("=")[::2] for line in lines)
    origins = variables["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
    assert {f"http://127.0.0.1:{port}", f"http://localhost:{port}"} < set(origins)
    assert all(origin.endswith(f":{port}") and "*" not in origin for origin in origins)
    monkeypatch.setenv(server.HOST, "127.0.0.1")
    with pytest.raises(UsageError, match=r"listens on 0\.0\.0\.0, not on 127\.0\.0\.1.*down"):
        server.find_or_launch()
    server.stop_server()
    for wrong in ("192.0.2.1", "no such host", "256.1.1.1"):
        monkeypatch.setenv(server.HOST, wrong)
        with pytest.raises(UsageError, match=server.HOST):
            server.find_or_launch()
    monkeypatch.setenv(server.HOST, "::1")
    if Path("/proc/net/if_inet6").exists():
        assert start().ui.startswith("http://[::1]:")
