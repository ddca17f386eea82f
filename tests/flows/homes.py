"""Homes of geofm's server for tests, and strangers on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from flows.service import serve, server

#: Makes a home the current one.
Enter = Callable[[str], Path]


def start() -> server.Server:
    started = server.find_or_launch()
    server.wait_for(started)
    return started


@contextmanager
def stranger(port: int = 0) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A program on loopback that says yes to everything and keeps the headers sent to it."""
    heard: list[dict[str, str]] = []

    class Yes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(dict(self.headers))
            self.send_response(200)
            self.send_header(serve.PROOF_HEADER, "ü" * 8)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", port), Yes)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}", heard
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def status(address: str, secret: str = "") -> int:
    auth = tuple(secret.split(":")) if secret else None
    return httpx.get(address, auth=auth, trust_env=False).status_code
