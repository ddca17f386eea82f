"""An HTTP proxy on loopback that stands before the S3 gateway and answers wrongly on request."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import s3fs

#: The answer to a request (method, path): None for the gateway's own; a status with the code of
#: an S3 error; ``reset`` and ``cut`` end the connection, before the answer and within it.
Fault = Callable[[str, str], str | None]

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, made up</Message></Error>"
CODES = {"403 AccessDenied", "403 ExpiredToken", "404 NoSuchKey", "500 InternalError",
         "503 ServiceUnavailable"}  # fmt: skip


class FaultProxy:
    """A proxy; ``fault`` decides on each request, ``asked`` has them all."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.asked: list[tuple[str, str]] = []
        self.fault: Fault = lambda _method, _path: None

    def always(self, answer: str, within: str = "", times: int | None = None) -> None:
        """Answer reads of paths that contain a text like this, so many times each."""
        counts: dict[str, int] = {}

        def fault(method: str, path: str) -> str | None:
            if method not in ("GET", "HEAD") or within not in path:
                return None
            counts[path] = counts.get(path, 0) + 1
            return answer if times is None or counts[path] <= times else None

        self.fault = fault


@contextmanager
def fault_proxy(cache: Path) -> Iterator[FaultProxy]:
    """Put a proxy before the gateway that AWS_ENDPOINT_URL names, with a cache of its own."""
    gateway = os.environ["AWS_ENDPOINT_URL"]
    proxy = FaultProxy(gateway.removeprefix("http://"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            proxy.asked.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault(self.command, self.path)
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
                return
            if fault in CODES:
                status, code = str(fault).split()
                text = b"" if self.command == "HEAD" else ERROR.format(code=code).encode()
                self.reply(int(status), [("Content-Type", "application/xml")], text)
                return
            upstream = http.client.HTTPConnection(proxy.gateway, timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            found = upstream.getresponse()
            data = found.read()
            skipped = ("transfer-encoding", "content-length", "connection")
            headers = [(n, v) for n, v in found.getheaders() if n.lower() not in skipped]
            length = found.getheader("Content-Length") or str(len(data))
            if fault == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            self.reply(found.status, headers, data, length)
            upstream.close()

        def reply(
            self, status: int, headers: list[tuple[str, str]], data: bytes, length: str = ""
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "GEOFM_CACHE")}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["GEOFM_CACHE"] = str(cache)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield proxy
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
