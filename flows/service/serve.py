"""The process of the Prefect server, in which each request needs the home's secret.

The module runs as a script, or as ``python -m flows.service.serve``. Prefect's own variables
configure the server, and Prefect checks the secret in requests to its API. This module adds:

- The server refuses to start without a secret, without CSRF protection, or with every origin
  allowed.
- The pages that document the API, which Prefect leaves open, need the secret too.
- A client can request a proof that the server knows the secret, without sending the secret.
- The pages of the UI may load nothing from, and send nothing to, another server. (Prefect's UI asks
  an analytics service on every page, whatever its settings are.)

The module imports nothing of geofm, so it runs in any folder.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

App = Callable[[Any, Any, Any], Awaitable[None]]

#: Request header with a random text, and response header with its keyed hash.
NONCE_HEADER, PROOF_HEADER = "geofm-nonce", "geofm-proof"
#: Content-Security-Policy of the pages.
OWN_SERVER_ONLY = (
    b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    b"connect-src 'self' data: blob:; form-action 'self'; base-uri 'self'"
)
#: Pages that document the API. Prefect serves them without authentication.
DOCUMENTATION = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}


def proof(secret: str, port: int, nonce: str) -> str:
    """Return the response to a nonce by which a server proves that it knows the secret.

    The port is part of the hash. So a program on another port can't forward the nonce to the real
    server and return its response.
    """
    return hmac.new(secret.encode(), f"{port} {nonce}".encode(), hashlib.sha256).hexdigest()


def guard(app: App, secret: str) -> App:
    """Wrap Prefect's application: protect the documentation pages, and respond to nonces."""
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
            await app(scope, receive, _with_policy(send))

    return guarded


def _with_policy(send: Any) -> Any:
    """Add the policy to the headers of a page."""

    async def send_with_policy(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            if any(name == b"content-type" and b"text/html" in value for name, value in headers):
                headers.append((b"content-security-policy", OWN_SERVER_ONLY))
                message = {**message, "headers": headers}
        await send(message)

    return send_with_policy


async def _respond(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Send a small JSON response."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def hide_headers() -> None:
    """Drop log lines with secrets: headers (uvicorn, below INFO) and webhooks (httpx, INFO).

    Prefect configures logging again when its application starts. That changes levels, but it keeps
    the filters of loggers.
    """
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.INFO)
    logging.getLogger("httpx").addFilter(lambda record: record.levelno > logging.INFO)


def main(arguments: list[str]) -> None:
    """Serve on an inherited listening socket (``--fd N``), or else on the port of the settings."""
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
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS allows every web page: list the addresses at "
            "which the UI is opened, such as http://localhost:4200"
        )
    import uvicorn
    from prefect.server.api.server import create_app

    hide_headers()
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
