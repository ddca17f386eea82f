"""What a stranger can do to the Prefect server: a page in a browser, a program, another user."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.flows.browser import browser
from tests.flows.conftest import SET_BY_SERVER, Outcome, files_with_secret

pytestmark = pytest.mark.slow

#: All that may be read without the secret, apart from the UI's files.
OPEN = {"/api/health", "/api/ready", "/ui-settings"}
#: The browser knows two names; the first is a stranger's.
OFFLINE = (
    "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, "
    "EXCLUDE localhost"
)
UUID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def root(environment: dict[str, str]) -> str:
    """Address of the server."""
    return environment["PREFECT_API_URL"].removesuffix("/api")


def rows(api: httpx.Client) -> dict[str, int]:
    """How many of each thing the server's database has."""
    tables = ("flows", "flow_runs", "deployments", "variables", "work_pools", "block_documents")
    return {t: len(api.post(f"/{t}/filter", json={}).raise_for_status().json()) for t in tables}


def routes() -> tuple[dict[str, set[str]], set[str]]:
    """Methods of every HTTP path of Prefect's application, and its web socket paths."""
    from fastapi.routing import APIWebSocketRoute
    from prefect.server.api.server import API_ROUTERS, create_app

    app: Any = create_app(ephemeral=True, ignore_cache=True)
    http = {f"/api{path}": set(m) for path, m in app.api_app.openapi()["paths"].items()}
    for mount in app.routes:
        inner = getattr(getattr(mount, "app", None), "routes", [])
        for route in [mount, *inner]:
            prefix = "" if route is mount else mount.path
            if methods := getattr(route, "methods", None):
                http.setdefault(prefix + route.path, set()).update(m.lower() for m in methods)
    sockets = {
        f"/api{route.path}"
        for router in API_ROUTERS
        for route in router.routes
        if isinstance(route, APIWebSocketRoute)
    }
    return http, sockets


@pytest.mark.long
def test_no_route_answers_without_the_secret(root: str, api: httpx.Client) -> None:
    before = rows(api)
    http, sockets = routes()
    assert len(http) > 150 and OPEN | {"/docs", "/redoc", "/openapi.json"} <= set(http)
    open_ = set()
    wrong = base64.b64encode(b"geofm:wrong").decode()
    headers: list[dict[str, str]] = [
        {}, {"Authorization": f"Basic {wrong}"},
        {"Prefect-Csrf-Token": "x", "Prefect-Csrf-Client": "y", "Origin": "https://evil.example"},
    ]  # fmt: skip
    with httpx.Client(base_url=root, trust_env=False, timeout=30) as anybody:
        for path, methods in http.items():
            parts = [UUID if part.startswith("{") else part for part in path.split("/")]
            for method in methods | {"get", "head"}:
                for given in headers if method != "head" else headers[:1]:
                    answer = anybody.request(method, "/".join(parts), headers=given)
                    if answer.status_code not in (401, 403):
                        open_.add((path, method, answer.status_code))
    left = {path for path, method, status in open_ if status not in (404, 405)}
    assert left <= OPEN, open_
    assert {status for path, _, status in open_ if path in OPEN} <= {200, 405}
    assert rows(api) == before
    assert len(sockets) >= 5
    for path in sockets:
        asyncio.run(_is_closed(root.replace("http", "ws") + path.replace("{work_pool_name}", "x")))


async def _is_closed(url: str) -> None:
    """Check that a web socket says nothing but goodbye without the secret."""
    messages = [
        [], ["{}"], ['{"type": "auth"}'], ['{"type": "auth", "token": null}'],
        ['{"type": "auth", "token": "geofm:wrong"}', '{"type": "subscribe"}'],
        ['{"type": "subscribe", "filter": {}}'],
    ]  # fmt: skip
    for protocols in (None, ["prefect"]):
        for sent in messages:
            try:
                async with connect(url, subprotocols=protocols, proxy=None) as socket:
                    for message in sent:
                        await socket.send(message)
                    if sent:
                        heard = await asyncio.wait_for(socket.recv(), 20)
                        raise AssertionError(f"{url} said {heard!r} after {sent}")
            except WebSocketException:
                continue  # refused, or closed


def test_only_the_exact_secret_opens(root: str, environment: dict[str, str]) -> None:
    secret = environment["PREFECT_API_AUTH_STRING"]
    encoded = base64.b64encode(secret.encode()).decode()
    bad = [
        "", "Basic", f"Bearer {secret}", f"Bearer {encoded}", secret, encoded,
        *(f"Basic {base64.b64encode(text.encode()).decode()}" for text in
          (secret[:-1], secret + "x", secret.upper(), "geofm:", ":", "ü:ü", secret + "\n")),
        "Basic !!!", "Basic " + "A" * 10_000,
    ]  # fmt: skip
    # a connection for each request: the server closes one that brought a malformed header
    apart = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=root, trust_env=False, timeout=30, limits=apart) as client:
        for path in ("/api/admin/version", "/openapi.json", "/docs", "/api/docs", "/docs?x=1"):
            assert client.get(path, headers={"Authorization": f"Basic {encoded}"}).is_success
            for value in bad:
                answer = client.get(path, headers={"Authorization": value})
                assert answer.status_code >= 400, (path, value)
        # by other ways to write the same path
        for path in ("/%64ocs", "//docs", "/docs/", "/./docs", "/api/../docs", "/DOCS", "/docs;x"):
            text = client.get(path, follow_redirects=True).text
            assert "swagger" not in text.lower() and "openapi" not in text, path
        for path in ("/api//health/../flows", "/api/health/", "/api/health/x", "/api/ready?/flows"):
            text = client.get(path, follow_redirects=True).text
            assert "[" not in text or "<" in text, path
        # a name that was pointed at loopback after the page was loaded
        for host in ("evil.example", "/api/health", "127.0.0.1/api/health?"):
            answer = client.get("/api/flows/count", headers={"Host": host})
            assert answer.status_code >= 400


def test_other_origins_get_no_permission(root: str, api: httpx.Client) -> None:
    port = root.rpartition(":")[2]
    own = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
    others = [
        "https://evil.example", "null", "http://127.0.0.1", "http://localhost:1",
        f"https://localhost:{port}", f"http://evil.localhost:{port}", f"http://127.0.0.2:{port}",
        f"{own[0]}.evil.example", "file://", "",
    ]  # fmt: skip
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    with httpx.Client(base_url=root, trust_env=False, timeout=30) as client:
        for path in ("/api/flows/", "/api/deployments/", "/api/health", "/ui-settings", "/docs"):
            for origin in others:
                for extra in (asked, {}):
                    headers = {"Origin": origin, **extra}
                    method = "OPTIONS" if extra else "GET"
                    answer = client.request(method, path, headers=headers)
                    assert "access-control-allow-origin" not in answer.headers, (path, origin)
        for origin in own:
            answer = client.options("/api/flows/", headers={"Origin": origin, **asked})
            assert answer.headers["access-control-allow-origin"] == origin
    # with the secret alone nothing is changed: a form in a page would need the token too
    before = rows(api)
    with httpx.Client(base_url=root, auth=api.auth, trust_env=False) as client:
        assert client.post("/api/flows/", json={"name": "x"}).status_code == 403
    assert rows(api) == before


#: A page that tries, from another origin, what a page can do; it reports each answer it could read.
ATTACK = """
async (root) => {
  const read = {};
  const flow = JSON.stringify({name: "planted"});
  const tries = {};
  for (const path of ["/api/flows/", "/api/deployments/", "/api/variables/", "/api/work_pools/",
                      "/api/flow_runs/", "/api/flows/filter", "/api/deployments/filter"]) {
    tries["simple " + path] = [path, {method: "POST", mode: "no-cors", body: flow}];
    for (const type of ["text/plain", "application/json"])
      tries[type + path] = [path, {method: "POST", headers: {"Content-Type": type}, body: flow}];
    tries["cookies " + path] = [path, {method: "POST", credentials: "include", body: flow}];
    tries["put " + path] = [path, {method: "PUT", body: flow}];
  }
  for (const path of ["/api/admin/settings", "/api/admin/version", "/api/hello", "/openapi.json",
                      "/api/csrf-token?client=x", "/docs", "/api/flows/count", "/ui-settings"])
    tries["get " + path] = [path, {}];
  for (const [name, [path, options]] of Object.entries(tries)) {
    try {
      const answer = await fetch(root + path, options);
      read[name] = answer.type == "opaque" ? "opaque" : answer.status;
    } catch (error) { read[name] = "refused"; }
  }
  const form = document.createElement("form");
  form.method = "POST"; form.enctype = "text/plain"; form.action = root + "/api/flows/";
  form.target = "sink";
  form.innerHTML = `<input name='{"name": "planted", "x": "' value='"}'>`;
  const frame = document.createElement("iframe"); frame.name = "sink";
  document.body.append(frame, form);
  const sent = new Promise(done => { frame.onload = done; setTimeout(done, 3000); });
  form.submit(); await sent;
  navigator.sendBeacon(root + "/api/flows/", flow);
  for (const path of ["/api/events/in", "/api/events/out", "/api/logs/out"]) {
    read["socket " + path] = await new Promise(done => {
      const socket = new WebSocket(root.replace("http", "ws") + path, ["prefect"]);
      socket.onopen = () => socket.send('{"type": "auth", "token": "geofm:wrong"}');
      socket.onmessage = (event) => done("said " + event.data);
      socket.onclose = () => done("closed");
    });
  }
  return read;
}
"""


@pytest.fixture
def page_server(tmp_path: Path) -> Iterator[int]:
    """Port of a web site with one page, on loopback."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<!doctype html><body>evil</body>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site.server_port
    site.shutdown()
    site.server_close()


def test_a_page_of_another_origin_does_nothing(
    root: str, api: httpx.Client, page_server: int, tmp_path: Path
) -> None:
    before = rows(api)
    port = root.rpartition(":")[2]
    with browser(tmp_path / "profile", OFFLINE) as page:
        for site in ("http://evil.example", "http://127.0.0.1", "http://localhost"):
            page.open(f"{site}:{page_server}/")
            read = page.run(f"({ATTACK})({json.dumps(root)})")
            assert len(read) > 40
            assert set(read.values()) <= {"refused", "opaque", "closed"}, read
        # a sandboxed frame has the origin "null"
        page.open("data:text/html,<body></body>")
        read = page.run(f"({ATTACK})({json.dumps(root)})")
        assert set(read.values()) <= {"refused", "opaque", "closed"}, read
        # a name that was pointed at loopback: the same origin, so answers can be read
        page.open(f"http://evil.example:{port}/ui-settings")
        read = page.run(f"({ATTACK})({json.dumps(f'http://evil.example:{port}')})")
        assert read.pop("get /ui-settings") == 200
        assert set(read.values()) <= {401, 403, "opaque", "refused", "closed"}, read
    assert rows(api) == before


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_ui_works_after_one_paste(
    root: str, api: httpx.Client, environment: dict[str, str], tmp_path: Path, host: str
) -> None:
    secret = environment["PREFECT_API_AUTH_STRING"]
    flow = api.post("/flows/", json={"name": f"flow-{host}"}).raise_for_status().json()["id"]
    made = {"name": f"click-{host}", "flow_id": flow, "entrypoint": "x.py:x", "path": "/"}
    deployment = api.post("/deployments/", json=made).raise_for_status().json()["id"]
    ui = f"http://{host}:{root.rpartition(':')[2]}/v2"
    with browser(tmp_path / "profile", OFFLINE) as page:
        page.call("Network.enable")
        page.open(f"{ui}/deployments/deployment/{deployment}")
        page.wait("!!document.querySelector('input[type=password]')")
        page.run("document.querySelector('input[type=password]').focus()")
        page.type(secret)
        page.click("Login")
        page.wait("!document.querySelector('input[type=password]')")
        page.open(f"{ui}/deployments/deployment/{deployment}")  # no second paste
        page.click("Run")
        page.click("Quick run")
        query = {"deployments": {"id": {"any_": [deployment]}}}
        page.wait("document.body.innerText.toLowerCase().includes('run created')")
        assert len(api.post("/flow_runs/filter", json=query).json()) == 1
        for path in ("dashboard", "runs", "settings", "work-pools", "events"):
            page.open(f"{ui}/{path}")
            page.wait("document.body.innerText.length > 100")
            assert "login" not in page.run("location.href")
            assert secret not in page.run("location.href + document.body.innerText")
        page.open(f"{ui.removesuffix('/v2')}/dashboard")  # the older UI
        page.wait("document.body.innerText.length > 100")
        # no page asks another server: Prefect's UI would ask an analytics service on each
        requested = {urlsplit(url).hostname for url in page.requests() if url.startswith("http")}
        assert requested == {host}


def test_the_prefect_command_works_with_geofm_env(
    geofm: Any, environment: dict[str, str], root: str, tmp_path: Path
) -> None:
    hidden = {k: v for k, v in environment.items() if not k.startswith("PREFECT_API")}
    line = subprocess.run(
        [sys.executable, "-m", "flows.cli", "env"], env=hidden, cwd=tmp_path,
        text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    script = f'eval "$1"; exec {sys.executable} -m prefect variable set geofm_env yes'
    done = subprocess.run(
        ["sh", "-c", script, "sh", line], env={**hidden, "PREFECT_HOME": str(tmp_path / "user")},
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_with_secret(tmp_path) == []
    outcome: Outcome = geofm("env", "--json")
    assert outcome.json["PREFECT_API_URL"] == f"{root}/api"


@pytest.mark.long
def test_two_homes_that_start_at_once_have_each_their_own_prefect(
    environment: dict[str, str], tmp_path: Path
) -> None:
    code = "from flows.service import server; server.wait_for(server.find_or_launch())"
    plain = {name: value for name, value in environment.items() if name not in SET_BY_SERVER}
    homes = [{**plain, "GEOFM_HOME": str(tmp_path / name)} for name in "ab"]
    command = [sys.executable, "-m", "flows.cli"]

    def ask(variables: dict[str, str]) -> tuple[str, tuple[str, ...]]:
        done = subprocess.run(
            [*command, "env", "--json"], env=variables, text=True, capture_output=True, check=True
        )
        found = json.loads(done.stdout)
        secret = tuple(found["PREFECT_API_AUTH_STRING"].split(":"))
        return f"{found['PREFECT_API_URL']}/admin/version", secret

    try:
        starts = [subprocess.Popen([sys.executable, "-c", code], env=home) for home in homes]
        assert [start.wait(300) for start in starts] == [0, 0]
        (first, secret_a), (second, secret_b) = map(ask, homes)
        assert first != second and secret_a != secret_b
        grid = [
            httpx.get(url, auth=secret, trust_env=False, timeout=30).status_code
            for url in (first, second)
            for secret in (secret_a, secret_b)
        ]
        assert grid == [200, 401, 401, 200]
        subprocess.run([*command, "down"], env=homes[0], check=True, stdout=subprocess.DEVNULL)
        assert httpx.get(second, auth=secret_b, trust_env=False, timeout=30).is_success
    finally:
        for home in homes:
            subprocess.run([*command, "down"], env=home, check=True, stdout=subprocess.DEVNULL)


def test_compose_asks_for_its_secrets() -> None:
    folder = Path(__file__).resolve().parents[3] / "docker"
    text = (folder / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    server, worker = services["server"]["environment"], services["worker"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"].startswith("${GEOFM_AUTH:?")
    assert worker["PREFECT_API_AUTH_STRING"] == server["PREFECT_SERVER_API_AUTH_STRING"]
    assert server["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    origins = server["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:4200", "http://localhost:4200"]
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]
    assert "flows.service.serve" in services["server"]["command"]
    assert "/api/health" in str(services["server"]["healthcheck"])
    assert not [name for name in server if name.startswith("AWS_")]
    assert ":-geofm" not in text and text.count("${GEOFM_DB_PASSWORD:?") == 3
