"""The Prefect server as geofm starts it: every request needs the home's secret.

Run as a process of its own, by path or with ``python -m flows.serve``; it is configured by
Prefect's own variables. Prefect checks the secret on its API. This module adds three things that
Prefect lacks:

- The server does not start without a secret, without CSRF protection, or open to every origin.
- The API's documentation pages, which Prefect serves to everybody, need the secret as well.
- A client can ask the server to prove that it knows the secret, without sending the secret.

The module imports nothing of geofm, so that it runs from any folder.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

App = Callable[[Any, Any, Any], Awaitable[None]]

#: Request header with a random text, and response header with its keyed hash.
NONCE_HEADER, PROOF_HEADER = "geofm-nonce", "geofm-proof"
#: Paths outside the API that Prefect leaves open and that are no files of the UI.
DOCUMENTATION = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}


def proof(secret: str, port: int, nonce: str) -> str:
    """Return what a server that knows the secret answers to a nonce.

    The port is part of it, so that a stranger on another port cannot pass the question on to the
    real server and send back its answer.
    """
    return hmac.new(secret.encode(), f"{port} {nonce}".encode(), hashlib.sha256).hexdigest()


def guard(app: App, secret: str) -> App:
    """Wrap Prefect's application: close its documentation pages, answer nonces."""
    basic = b"Basic " + base64.b64encode(secret.encode())

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", []))
        nonce = headers.get(NONCE_HEADER.encode(), b"")
        if scope["type"] != "http":
            await app(scope, receive, send)
        elif scope["path"] in DOCUMENTATION and not hmac.compare_digest(
            headers.get(b"authorization", b""), basic
        ):
            await _respond(send, 401, b'{"exception_message":"Unauthorized"}')
        elif scope["path"] == "/api/health" and nonce:
            answer = proof(secret, scope["server"][1], nonce.decode("latin-1"))
            await _respond(send, 200, b"true", (PROOF_HEADER.encode(), answer.encode()))
        else:
            await app(scope, receive, send)

    return guarded


async def _respond(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Send a small JSON response."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def main(arguments: list[str]) -> None:
    """Serve on a listening socket that was inherited (``--fd N``), else on Prefect's own port."""
    from prefect.settings import get_current_settings

    api = get_current_settings().server.api
    secret = api.auth_string.get_secret_value() if api.auth_string else ""
    if not secret:
        sys.exit(
            "PREFECT_SERVER_API_AUTH_STRING is empty: set it to user:password, such as geofm:…"
        )
    if not api.csrf_protection_enabled:
        sys.exit("PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED is off: set it to true")
    if "*" in api.cors_allowed_origins:
        sys.exit(
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS lets every web page in: list the addresses "
            "at which the UI is opened, such as http://localhost:4200"
        )
    import uvicorn
    from prefect.server.api.server import create_app

    # uvicorn logs headers and web socket frames, and so the secret, at the levels below "info"
    level = get_current_settings().server.logging_level.lower()
    config = uvicorn.Config(
        guard(create_app(final=True), secret),
        host=api.host,
        port=api.port,
        log_level="info" if level in ("notset", "debug") else level,
        timeout_keep_alive=api.keepalive_timeout,
        ws_ping_interval=api.websocket_ping_interval,
        ws_ping_timeout=api.websocket_ping_timeout,
    )
    inherited = [socket.socket(fileno=int(arguments[1]))] if arguments[:1] == ["--fd"] else None
    uvicorn.Server(config).run(inherited)


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    main(sys.argv[1:])
