"""The server of reports: pages of the catalogue for a browser, read-only, behind the password.

It runs as ``python -m flows.service.pages`` beside the workers of `geofm up`, on loopback, and
serves the reports that the store has. The browser asks for the password of the Prefect server once:
the user is the part before the colon.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import jinja2
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import ArtifactRow
from data_catalog.errors import GeofmError
from flows.service.home import AUTH_FILE, auth_string, home
from flows.service.server import LOOPBACK, configured_server, listen
from flows.settings import PAGES, open_place

#: Variables with the listening socket that the process inherits, and with the address to listen on,
#: loopback by default.
SOCKET, HOST = "GEOFM_PAGES_SOCKET", "GEOFM_PAGES_HOST"
#: Port that is tried first.
PORT = 4300
#: Types of the files that are served.
TYPES = {".html": "text/html; charset=utf-8", ".png": "image/png"}
#: Headers of every response. Pages load nothing from elsewhere and run no scripts.
HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self' data:; style-src "
    "'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "private, max-age=60",
}
_DIGEST = re.compile(r"[0-9a-f]{64}")

INDEX = jinja2.Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>geofm reports</title>
<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;color:#1f2933}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.4rem .8rem .4rem 0;
border-bottom:1px solid #e4e7eb}code{color:#52606d}</style></head><body>
<h1>Reports</h1>
{% if reports %}<table><tr><th>report</th><th>dataset</th><th>model</th><th>made</th></tr>
{% for r in reports %}<tr><td><a href="reports/{{ r.digest }}/report.html">{{ r.digest[:12] }}</a>
</td><td>{{ r.dataset }}</td><td>{{ r.model }}</td><td>{{ r.made }}</td></tr>{% endfor %}</table>
{% else %}<p>No report is in this catalogue. <code>geofm-pretrain</code> writes one.</p>{% endif %}
</body></html>"""
)


@dataclass(frozen=True)
class ReportRow:
    """A report, with the names of what it is about."""

    digest: str
    dataset: str
    model: str
    made: str


def make_app(catalogue: Catalogue, secret: str) -> FastAPI:
    """Make the application.

    Args:
        catalogue: Catalogue, at the store that has the reports.
        secret: ``user:password`` that a browser must give.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    wanted = b"Basic " + base64.b64encode(secret.encode())

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Any]) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if hmac.compare_digest(given, wanted):
            response: Response = await call(request)
        else:
            ask = 'Basic realm="geofm: user and password as geofm env prints", charset="UTF-8"'
            response = Response("Password required.\n", 401, {"www-authenticate": ask})
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(INDEX.render(reports=list_reports(catalogue)))

    @app.get("/reports/{digest}")
    @app.get("/reports/{digest}/")
    def open_report(digest: str) -> RedirectResponse:
        return RedirectResponse(f"/reports/{digest[:64]}/report.html", 307)

    @app.get("/reports/{digest}/{name}")
    def report_file(digest: str, name: str) -> Response:
        try:
            found = find_file(catalogue, digest, name)
        except GeofmError as error:
            return Response(f"{error}\n", 404)
        return found or Response("No such report in this catalogue.\n", 404)

    return app


def list_reports(catalogue: Catalogue) -> list[ReportRow]:
    """List the reports of a catalogue, newest first."""
    names = {row.digest: f"{row.name}@{row.version}" for row in reversed(catalogue.names())}

    def named(row: ArtifactRow, role: str) -> str:
        digest = str(row.manifest["inputs"].get(role, ""))
        return names.get(digest, digest[:12])

    return [
        ReportRow(
            row.digest,
            named(row, "dataset"),
            named(row, "model"),
            f"{row.created_at:%Y-%m-%d %H:%M} UTC",
        )
        for row in catalogue.artifacts("report")
    ]


def find_file(catalogue: Catalogue, digest: str, name: str) -> FileResponse | None:
    """Find a file of a report that the catalogue has; None if there is none.

    Raises:
        GeofmError: The catalogue does not have the artifact, or the store not the file.
    """
    kind = TYPES.get(PurePosixPath(name).suffix)
    if not _DIGEST.fullmatch(digest) or kind is None or catalogue.kind(digest) != "report":
        return None
    report = catalogue.get(digest)
    if name not in {file.path for file in report.manifest.files}:
        return None
    path = report.local(name)
    return FileResponse(path, media_type=kind) if path.is_file() else None


def listen_for_pages() -> socket.socket:
    """Return the socket that the pages are served on, and set the variables that name it.

    Raises:
        UsageError: ``GEOFM_PAGES_HOST`` is no address of this machine.
    """
    listener = listen(os.environ.get(HOST) or LOOPBACK, "pages.port", PORT, HOST)
    # browsers of this machine reach a server on all interfaces, also a container's, at loopback
    host = os.environ.get(HOST) or LOOPBACK
    name = {"0.0.0.0": LOOPBACK, "::": LOOPBACK}.get(host, host)  # noqa: S104
    port = listener.getsockname()[1]
    os.environ[PAGES] = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    os.environ[SOCKET] = str(listener.fileno())
    return listener


def pages_password() -> str:
    """Say which password the pages ask for."""
    if configured_server() and not _secret_of_server():
        return f"the password in {home() / AUTH_FILE}"
    return "the same password"


def _secret_of_server() -> str:
    """Return ``user:password`` of a configured server; empty if there is none."""
    return configured_server().get("PREFECT_API_AUTH_STRING", "")


def main() -> None:
    """Serve pages on the inherited socket."""
    place = open_place(write=False)
    secret = _secret_of_server() or auth_string()
    config = uvicorn.Config(
        make_app(place.catalogue, secret), log_level="warning", server_header=False
    )
    uvicorn.Server(config).run([socket.socket(fileno=int(os.environ[SOCKET]))])


if __name__ == "__main__":
    main()
