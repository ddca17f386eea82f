"""Bytes of remote assets: whole or by range, with retries, over http(s) or s3.

Faults that pass (429, 5xx, lost connections, answers cut short) are retried with growing, slightly
random pauses; what is read does not depend on them. What stays wrong becomes a quarantine.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from geofm.imagery.hosts import Access, Signing, check_host, locate, origin, sign_url
from geofm.imagery.items import scheme_of
from geofm.imagery.quarantine import Quarantine

T = TypeVar("T")
REDIRECTS = 5
#: Longest pause (seconds) that a server's Retry-After is obeyed for.
MAX_PAUSE = 30.0
#: Bytes that a signing service's answer may have.
MAX_SIGNED = 64 * 1024
_pauses = random.Random()


class Fault(Exception):
    """A fault that may pass; ``pause`` is how long the server asks to wait (seconds)."""

    def __init__(self, detail: str, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.pause = pause


@dataclass(frozen=True)
class Piece:
    """Bytes with what the server says of the whole: its size, and its ETag where it has one."""

    data: bytes
    total: int
    etag: str


class Remote(Protocol):
    """An asset on a server."""

    def whole(self, most: int) -> Piece | None:
        """All bytes; None when there are more than ``most``."""

    def part(self, start: int, end: int) -> Piece:
        """Bytes from ``start`` up to ``end`` (or to the end of the file)."""


def patiently(attempt: Callable[[], T], retries: int, what: str) -> T:
    """Call until it works.

    Raises:
        Quarantine: ``unreachable`` (passing) when the last retry fails as well.
    """
    for number in range(retries + 1):
        try:
            return attempt()
        except Fault as fault:
            if number == retries:
                raise Quarantine(
                    "unreachable", f"{what}: {fault} ({retries + 1} attempts)", passing=True
                ) from fault
            pause = 0.1 * 2**number * (1 + _pauses.random())
            time.sleep(min(max(pause, fault.pause), MAX_PAUSE))
    raise AssertionError("unreachable")


@lru_cache(maxsize=8)
def http_client(timeout_s: float, process: int) -> httpx.Client:
    """One pool of connections a process (a fork must not share its parent's).

    Loopback never goes by a proxy.
    """
    direct = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}
    return httpx.Client(
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
        follow_redirects=False,
        headers={"accept-encoding": "identity", "user-agent": "geofm"},
        mounts=direct,
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
    )


@dataclass
class HttpAsset:
    """An asset by http(s); its address is signed where that is asked for.

    ``name`` is the href as it is stored, for messages: the address may hold a port of today.
    """

    href: str
    access: Access
    signing: Signing = field(default_factory=Signing)
    name: str = ""
    _signed: str = field(default="", repr=False)

    def whole(self, most: int) -> Piece | None:
        """All bytes, checked against the length that the server told."""

        def attempt() -> Piece | None:
            with self._get({}) as answer:
                told = _length(answer)
                if told is not None and told > most:
                    return None
                data = bytearray()
                for block in answer.iter_raw():
                    data += block
                    if len(data) > most:
                        return None
                if told is not None and len(data) != told:
                    raise Fault(f"{len(data)} of {told} bytes came")
                return Piece(bytes(data), len(data), answer.headers.get("etag", ""))

        return self._retry(attempt)

    def part(self, start: int, end: int) -> Piece:
        """A range, checked against what was asked for."""

        def attempt() -> Piece:
            with self._get({"range": f"bytes={start}-{end - 1}"}) as answer:
                if answer.status_code != 206:
                    raise Quarantine("no_ranges", f"{self.where} does not serve byte ranges")
                first, total = _content_range(answer.headers.get("content-range", ""))
                want = min(end, total) - start
                data = bytearray()
                for block in answer.iter_raw():
                    data += block
                    if len(data) > want:
                        break
                if first != start or len(data) != want:
                    raise Fault(f"{len(data)} of {want} bytes came")
                return Piece(bytes(data), total, answer.headers.get("etag", ""))

        return self._retry(attempt)

    @property
    def where(self) -> str:
        """The stored href without its query, for messages."""
        return (self.name or self.href).partition("?")[0][:200]

    def _retry(self, attempt: Callable[[], T]) -> T:
        def guarded() -> T:
            try:
                return attempt()
            except httpx.TransportError as error:
                raise Fault(f"{type(error).__name__}: {error}"[:120]) from error

        return patiently(guarded, self.access.retries, self.where)

    def _get(self, headers: dict[str, str]) -> _Answer:
        """An open answer with status 200 or 206; a refusal is answered by signing (again) once."""
        if self.signing.always and not self._signed:
            self._sign()
        try:
            return _Answer(self._signed or self.href, headers, self.access, self.where)
        except _Refused as refused:
            if not self._sign():
                raise Quarantine("forbidden", f"{self.where} answers {refused.status}") from refused
        try:
            return _Answer(self._signed, headers, self.access, self.where)
        except _Refused as refused:
            raise Fault(f"answers {refused.status} to a signed address") from refused

    def _sign(self) -> bool:
        """Get a signed address (again); False where nobody signs."""
        url = sign_url(self.href, self.signing, self.access)
        if not url:
            return False
        try:
            with _Answer(url, {}, self.access, "the signing service") as answer:
                body = _beginning(answer, MAX_SIGNED)
        except (Quarantine, _Refused) as error:
            if self.signing.always:
                raise Quarantine("forbidden", f"{self.where} could not be signed") from error
            return False
        try:
            signed = json.loads(body)["href"]
            same = urlsplit(signed)[:3] == urlsplit(self.href)[:3]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Quarantine("forbidden", f"{url.partition('?')[0]} does not sign") from error
        if not same:
            raise Quarantine("forbidden", f"{self.where} was signed as another address")
        origin(signed)
        self._signed = signed
        return True


class _Refused(Exception):
    """The server wants credentials."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class _Answer:
    """A streamed answer after redirects, each hop of which the host policy allows."""

    def __init__(self, url: str, headers: dict[str, str], access: Access, where: str) -> None:
        client = http_client(access.timeout_s, os.getpid())
        for _ in range(REDIRECTS + 1):
            request = client.build_request("GET", url, headers=headers)
            answer = client.send(request, stream=True)
            if not answer.has_redirect_location:
                break
            answer.close()
            url = _follow(url, answer.headers["location"])
            check_host(url, access)
        else:
            raise Quarantine("too_many_redirects", f"{where} redirects on and on")
        self.answer = answer
        problem = _problem(answer, where)
        if problem is not None:
            answer.close()
            raise problem

    def __enter__(self) -> httpx.Response:
        return self.answer

    def __exit__(self, *error: object) -> None:
        self.answer.close()


def _follow(url: str, location: str) -> str:
    """The address that a redirect leads to, not checked yet."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise Quarantine("bad_href", f"a redirect leads to no address: {location!a:.80}") from error


def _beginning(answer: httpx.Response, most: int) -> bytes:
    """The first bytes of an answer; what comes after them is not waited for."""
    data = bytearray()
    for block in answer.iter_raw():
        data += block
        if len(data) >= most:
            break
    return bytes(data[:most])


def _problem(answer: httpx.Response, where: str) -> Exception | None:
    """None for 200 and 206; other answers are a fault that passes, or final."""
    status = answer.status_code
    if status in (200, 206):
        return None
    if status in (408, 425, 429) or status >= 500:
        return Fault(f"answers {status}", _retry_after(answer))
    if status in (401, 403):
        return _Refused(status)
    if status in (404, 410):
        return Quarantine("not_found", f"{where} answers {status}")
    return Quarantine("http_error", f"{where} answers {status}")


def _retry_after(answer: httpx.Response) -> float:
    return float(_whole(answer.headers.get("retry-after", "")) or 0)


def _length(answer: httpx.Response) -> int | None:
    return _whole(answer.headers.get("content-length", ""))


def _whole(text: str) -> int | None:
    """A number of a header, None for anything that is no plain number of sensible length."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _content_range(text: str) -> tuple[int, int]:
    """First byte and size of the whole of ``bytes 0-99/1234``."""
    span, _, size = text.removeprefix("bytes ").partition("/")
    first, total = _whole(span.partition("-")[0]), _whole(size)
    if first is None or total is None:
        raise Quarantine("no_ranges", f"the answer to a range says {text!a:.60}")
    return first, total


@lru_cache(maxsize=4)
def s3_files(anonymous: bool, requester_pays: bool, endpoint: str, process: int) -> Any:
    """The s3 client of a process (a fork can't use its parent's); boto finds the credentials."""
    import s3fs

    return s3fs.S3FileSystem(
        anon=anonymous,
        requester_pays=requester_pays,
        endpoint_url=endpoint or None,
        skip_instance_cache=True,
    )


@dataclass
class S3Asset:
    """An asset in a bucket. ``AWS_NO_SIGN_REQUEST`` and ``AWS_REQUEST_PAYER`` are heeded."""

    href: str
    access: Access
    _told: Piece | None = field(default=None, repr=False)

    def whole(self, most: int) -> Piece | None:
        """All bytes."""
        info = self._info()
        if info.total > most:
            return None
        data = self._retry(lambda files: files.cat_file(self.href))
        if len(data) != info.total:
            raise Quarantine("truncated", f"{len(data)} of {info.total} bytes came", passing=True)
        return Piece(data, info.total, info.etag)

    def part(self, start: int, end: int) -> Piece:
        """A range."""
        info = self._info()
        stop = min(end, info.total)
        data = self._retry(lambda files: files.cat_file(self.href, start=start, end=stop))
        return Piece(data, info.total, info.etag)

    def _info(self) -> Piece:
        """Size and ETag, asked for once."""
        if self._told is None:
            found = self._retry(lambda files: files.info(self.href))
            self._told = Piece(b"", int(found["size"]), str(found.get("ETag", "")))
        return self._told

    def _retry(self, call: Callable[[Any], T]) -> T:
        from botocore.exceptions import (
            BotoCoreError,
            NoCredentialsError,
            ParamValidationError,
        )

        def attempt() -> T:
            try:
                return call(
                    s3_files(
                        os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1"),
                        os.environ.get("AWS_REQUEST_PAYER", "") == "requester",
                        os.environ.get("AWS_ENDPOINT_URL_S3")
                        or os.environ.get("AWS_ENDPOINT_URL", ""),
                        os.getpid(),
                    )
                )
            except FileNotFoundError as error:
                raise Quarantine("not_found", f"{self.href} does not exist") from error
            except (PermissionError, NoCredentialsError) as error:
                raise Quarantine(
                    "forbidden",
                    f"{self.href}: access denied; give AWS credentials, or AWS_NO_SIGN_REQUEST=YES "
                    "for a public bucket",
                ) from error
            except (ParamValidationError, ValueError) as error:
                raise Quarantine("bad_href", f"no bucket and key: {self.href!a:.80}") from error
            except (OSError, BotoCoreError) as error:
                raise Fault(f"{type(error).__name__}: {error}"[:120]) from error

        return patiently(attempt, self.access.retries, self.href)


def remote(href: str, access: Access, signing: Signing = Signing()) -> Remote:  # noqa: B008
    """The asset behind a stored href.

    Raises:
        Quarantine: ``bad_scheme``, ``bad_href`` or ``host_refused``.
    """
    if scheme_of(href) == "catalog" and access.stac.startswith("/"):
        from geofm.imagery.local import LocalAsset

        return LocalAsset(href, access.stac)
    url = locate(href, access)
    if scheme_of(url) == "s3":
        return S3Asset(url, access)
    return HttpAsset(url, access, signing, name=href)
