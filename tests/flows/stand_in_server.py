"""A stand-in for the Prefect server that starts at once: the guard around an empty application."""

from __future__ import annotations

import os
import socket
import sys

import uvicorn

from flows.service.serve import guard


async def app(scope, receive, send) -> None:
    """Answer every request with ``true``."""
    assert scope["type"] == "http", scope["type"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"true"})


if __name__ == "__main__":
    guarded = guard(app, os.environ["PREFECT_SERVER_API_AUTH_STRING"])
    config = uvicorn.Config(guarded, log_level="warning", lifespan="off")
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[2]))])
