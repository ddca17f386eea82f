"""Assets by http(s), in S3 buckets and in the folder of a local catalogue.

An asset is read whole or by range, with retries. Failures that may pass (429, 5xx, lost
connections, answers that are cut short or too slow) are retried with growing, random pauses; the
bytes that are read do not depend on them. Any other failure becomes a quarantine.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, urlsplit

from data_catalog.redaction import without_secrets
from data_catalog.storage.s3 import NoRanges, read_object
from geofm.remote.http import Answer, CredentialsRequired, open_response, record_of
from geofm.remote.quarantine import Quarantine
from geofm.remote.retry import Fault, host_record, read_with_retries
from geofm.remote.url_policy import (
    Access,
    HttpUrl,
    Signing,
    credentials_allowed,
    locate,
    parse_http_url,
    s3_options,
    scheme_of,
    sign_url,
)
from geofm.runtime.timestamps import parse_time

T = TypeVar("T")
#: Largest answer of a signing service (bytes).
MAX_SIGNED = 64 * 1024
#: Size of the first request for a file that is read whole (bytes); its answer states the size.
BEGINNING = 2**19
#: A signature that expires within this time (seconds) is renewed before it is used.
NEARLY_EXPIRED_S = 1.0


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, with the size of the whole file and its ETag, if it has one."""

    data: bytes
    total: int
    etag: str


class Remote(Protocol):
    """An asset on a server."""

    def whole(self, most: int) -> Piece | None:
        """Read all bytes; None if there are more than ``most``."""

    def part(self, start: int, end: int) -> Piece:
        """Read bytes from ``start`` up to ``end``, or to the end of the file."""


@dataclass
class HttpAsset:
    """An asset by http(s), whose address may have to be signed.

    Ranges are requested without If-Match. A changed file shows in the ETag and the size of each
    `Piece`; If-Match would always fail on weak ETags, and on mirrors with other ETags for the same
    bytes.

    Attributes:
        href: Address.
        access: Which hosts may be read, and the timeouts.
        signing: How the source signs addresses.
        name: Stored href, for messages; the address may contain a port of this run.
    """

    href: str
    access: Access
    signing: Signing = field(default_factory=Signing)
    name: str = ""
    _signed: str = field(default="", repr=False)
    _expires: float = field(default=math.inf, repr=False)
    _signs: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def whole(self, most: int) -> Piece | None:
        """Read all bytes; None if there are more than ``most``.

        The first request states the size, so a file with more bytes is not transferred.
        """
        if most < 1:
            return None

        def attempt() -> Piece | None:
            begin = self._begin(most)
            if begin is None or begin.total > most:
                return None
            if len(begin.data) == begin.total:
                return begin
            rest = self._range(len(begin.data), begin.total)
            if (rest.total, rest.etag) != (begin.total, begin.etag):
                raise Fault("the file changed while it was read")
            return Piece(begin.data + rest.data, begin.total, begin.etag)

        return self._retry(attempt)

    def part(self, start: int, end: int) -> Piece:
        """Read a range and check that it is the one that was requested."""
        return self._retry(lambda: self._range(start, end))

    def _range(self, start: int, end: int) -> Piece:
        """Try once to read a range."""
        with self._get(_span(start, end)) as answer:
            if answer.status != 206:
                raise Quarantine("no_ranges", f"{self.where} does not serve byte ranges")
            return _piece(answer, start, end)

    def _begin(self, most: int) -> Piece | None:
        """Try once to read the beginning, or all bytes from a server without ranges."""
        first = min(most, BEGINNING)
        with self._get(_span(0, first)) as answer:
            if answer.status == 206:
                return _piece(answer, 0, first)
            length = _header_number(answer.headers.get("content-length", ""))
            if length is not None and length > most:
                return None
            data = answer.read(most + 1)
            if len(data) > most:
                return None
            if (length is None and not data) or (length is not None and len(data) != length):
                raise Fault(f"received {len(data)} of {length} bytes")
            return Piece(data, len(data), answer.headers.get("etag", ""))

    @property
    def where(self) -> str:
        """Stored href without its query, for messages."""
        return without_secrets(self.name or self.href).partition("?")[0][:200]

    def _retry(self, attempt: Callable[[], T]) -> T:
        return read_with_retries(attempt, self.access.retries, self.where, record_of(self.href))

    @contextmanager
    def _get(self, headers: dict[str, str]) -> Iterator[Answer]:
        """Open an answer with status 200 or 206; a refused address is signed and tried again."""
        if self._unsigned():
            self._sign(self._signed)
        with ExitStack() as stack:
            used = self._signed
            try:
                answer = stack.enter_context(self._open(used, headers))
            except CredentialsRequired as refused:
                if not self._sign(used):
                    raise Quarantine(
                        "forbidden", f"{self.where} answers {refused.status}"
                    ) from refused
                try:
                    answer = stack.enter_context(self._open(self._signed, headers))
                except CredentialsRequired as again:
                    raise Fault(f"answers {again.status} to a signed address") from again
                # the host's other assets are then signed before they are requested
                record_of(self.href).requires_signing = True
            yield answer

    def _open(self, signed: str, headers: dict[str, str]) -> AbstractContextManager[Answer]:
        return open_response(signed or self.href, headers, self.access, self.where)

    def _unsigned(self) -> bool:
        """Return whether the address has to be signed (again) before it is requested."""
        signs = self.signing.always or record_of(self.href).requires_signing
        return self._expired() or (signs and not self._signed)

    def _expired(self) -> bool:
        """Return whether the signature has expired, or is about to."""
        return time.time() > self._expires - NEARLY_EXPIRED_S

    def _sign(self, used: str) -> bool:
        """Replace the signed address ``used`` by a new one; False if there is no signing service.

        Threads whose signature has expired share the new one.
        """
        with self._signs:
            return self._signed != used or self._sign_now()

    def _sign_now(self) -> bool:
        url = sign_url(self.href, self.signing, self.access)
        if not url:
            return False
        try:
            with open_response(url, {}, self.access, "the signing service", trusted=True) as answer:
                body = answer.read(MAX_SIGNED)
        except (Quarantine, CredentialsRequired) as error:
            if self.signing.always:
                raise Quarantine("forbidden", f"{self.where} could not be signed") from error
            return False
        try:
            content = json.loads(body)
            signed = content["href"]
            ours, other = parse_http_url(self.href), parse_http_url(signed)
            same = ours[:3] == other[:3] and _path(ours) == _path(other)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            service = without_secrets(url).partition("?")[0]
            raise Quarantine("forbidden", f"{service} does not sign") from error
        if not same:
            raise Quarantine("forbidden", f"{self.where} was signed as another address")
        self._signed, self._expires = signed, expiry(signed, content.get("msft:expiry"))
        if self._expired():  # a clock is wrong or the lifetime too short: wait for a refusal
            self._expires = math.inf
        return True


def expiry(signed: str, stated: Any = None) -> float:
    """Return when a signed address expires, in seconds since the epoch; infinity if unknown.

    Args:
        signed: Address with ``se`` (Azure), ``X-Amz-Date`` and ``X-Amz-Expires``, or ``Expires``.
        stated: Time that the signing service states, RFC 3339.
    """
    query = dict(parse_qsl(urlsplit(signed).query))
    if (
        "X-Amz-Date" in query
        and (seconds := _header_number(query.get("X-Amz-Expires", ""))) is not None
    ):
        signed_at = parse_time(query["X-Amz-Date"])
        return signed_at.timestamp() + seconds if signed_at and signed_at.tzinfo else math.inf
    for text in (query.get("se"), query.get("Expires"), stated):
        if not isinstance(text, str):
            continue
        if (when := parse_time(text)) is not None and when.tzinfo is not None:
            return when.timestamp()
        with suppress(ValueError):
            epoch = float(text)
            return epoch if math.isfinite(epoch) else math.inf
    return math.inf


def _span(start: int, end: int) -> dict[str, str]:
    return {"range": f"bytes={start}-{end - 1}"}


def _path(url: HttpUrl) -> str:
    return url.target.partition("?")[0]


def _header_number(text: str) -> int | None:
    """Read a number of a header; None for anything but digits of a sensible length."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _piece(answer: Answer, start: int, end: int) -> Piece:
    """Read an answer to a range: as many bytes as were requested, fewer only at the file's end."""
    span = answer.headers.get("content-range", "")
    if not span and not answer.read(1):
        raise Fault("the answer ended within its headers")
    first, total = _content_range(span)
    expected = min(end, total) - start
    if first != start or expected < 0:
        raise Fault(f"received bytes from {first} of {total}, requested from {start}")
    data = answer.read(expected + 1)
    if len(data) != expected:
        raise Fault(f"received {len(data)} of {expected} bytes")
    return Piece(data, total, answer.headers.get("etag", ""))


def _content_range(text: str) -> tuple[int, int]:
    """Return the first byte and the size of the file of ``bytes 0-99/1234``."""
    span, _, size = text.removeprefix("bytes ").partition("/")
    first, total = _header_number(span.partition("-")[0]), _header_number(size)
    if first is None or total is None:
        raise Quarantine("no_ranges", f"the answer to a range states {text!a:.60}")
    return first, total


@lru_cache(maxsize=8)
def s3_files(
    anonymous: bool, requester_pays: bool, endpoint: str, region: str, process: int
) -> Any:
    """Return the S3 client of a process; a fork can't use its parent's. boto finds credentials."""
    import s3fs

    return s3fs.S3FileSystem(
        anon=anonymous,
        requester_pays=requester_pays,
        endpoint_url=endpoint or None,
        client_kwargs={"region_name": region} if region else {},
        skip_instance_cache=True,
    )


@dataclass
class S3Asset:
    """An asset in a bucket; ``url_policy.s3_options`` applies the environment's settings."""

    href: str
    access: Access
    signing: Signing = field(default_factory=Signing)

    def whole(self, most: int) -> Piece | None:
        """Read all bytes; None if there are more than ``most``."""
        if most < 1:
            return None

        def attempt(files: Any) -> Piece | None:
            begin = self._read(files, 0, min(most, BEGINNING))
            if begin.total > most:
                return None
            if len(begin.data) == begin.total:
                return begin
            rest = self._read(files, len(begin.data), begin.total)
            if (rest.total, rest.etag) != (begin.total, begin.etag):
                raise Fault("the object changed while it was read")
            return Piece(begin.data + rest.data, begin.total, begin.etag)

        return self._retry(attempt)

    def part(self, start: int, end: int) -> Piece:
        """Read a range, with the size and the ETag of the same answer."""
        return self._retry(lambda files: self._read(files, start, end))

    def _read(self, files: Any, start: int, end: int) -> Piece:
        """Read a range in one request."""
        return Piece(*read_object(files, self.href, start, end, self.access.timeout_s))

    def _retry(self, call: Callable[[Any], T]) -> T:
        from botocore.exceptions import (
            BotoCoreError,
            NoCredentialsError,
            ParamValidationError,
        )

        host = host_record("s3://" + urlsplit(self.href).netloc)
        allowed = credentials_allowed(self.href, self.access, self.signing)

        def attempt() -> T:
            host.take_turn(self.access.requests_per_s)
            try:
                result = call(s3_files(*s3_options(self.signing, allowed), os.getpid()))
            except FileNotFoundError as error:
                raise Quarantine("not_found", f"{self.href} does not exist") from error
            except (PermissionError, NoCredentialsError) as error:
                remedy = (
                    "give AWS credentials, or AWS_NO_SIGN_REQUEST=YES for a public bucket"
                    if allowed
                    else "it was read without credentials; name its bucket in "
                    "search.credentials_for if your AWS credentials may be used for it"
                )
                raise Quarantine("forbidden", f"{self.href}: access denied; {remedy}") from error
            except (ParamValidationError, ValueError) as error:
                raise Quarantine("bad_href", f"no bucket and key: {self.href!a:.80}") from error
            except NoRanges as error:
                raise Quarantine(
                    "no_ranges", f"{self.href}: its endpoint does not serve byte ranges"
                ) from error
            except (OSError, BotoCoreError) as error:
                raise Fault(f"{type(error).__name__}: {error}"[:120], host_failed=True) from error
            host.answered()
            return result

        return read_with_retries(attempt, self.access.retries, self.href, host)


def remote(href: str, access: Access, signing: Signing = Signing()) -> Remote:  # noqa: B008
    """Return the asset of a stored href.

    Raises:
        Quarantine: ``bad_scheme``, ``bad_href`` or ``host_refused``.
    """
    if scheme_of(href) == "catalog" and access.stac.startswith("/"):
        return LocalAsset(href, access.stac)
    url = locate(href, access)
    if scheme_of(url) == "s3":
        return S3Asset(url, access, signing)
    return HttpAsset(url, access, signing, name=href)


#: Scheme of hrefs below the folder of a local catalogue.
SCHEME = "catalog"


def is_local(stac: str) -> bool:
    """Return whether a catalogue's address is a path of this machine."""
    return stac.startswith("/")


def folder_of(stac: str) -> str:
    """Return the folder of a local catalogue: that of its root file."""
    path = Path(stac)
    return str(path if path.is_dir() else path.parent)


@dataclass
class LocalAsset:
    """A file below the folder of the catalogue that lists it.

    Links that lead out of the folder are not followed.

    Attributes:
        href: ``catalog:/path/below/the/folder``.
        stac: Path of the catalogue.
    """

    href: str
    stac: str

    def whole(self, most: int) -> Piece | None:
        """Read all bytes; None if there are more than ``most``."""
        path, size, mark = self._file()
        return Piece(path.read_bytes(), size, mark) if size <= most else None

    def part(self, start: int, end: int) -> Piece:
        """Read bytes from ``start`` up to ``end``, or to the end of the file."""
        path, size, mark = self._file()
        with path.open("rb") as file:
            file.seek(start)
            return Piece(file.read(max(min(end, size) - start, 0)), size, mark)

    def _file(self) -> tuple[Path, int, str]:
        """Return the file, its size in bytes and a text that changes when the file does.

        Raises:
            Quarantine: ``bad_href`` for a path out of the folder, ``not_found`` without a file.
        """
        relative = self.href.removeprefix(f"{SCHEME}:").lstrip("/")
        try:
            folder = Path(folder_of(self.stac)).resolve()
            path = (folder / relative).resolve()
            inside = path.is_relative_to(folder)
            info = path.stat() if inside else None
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte in the path
            raise Quarantine("not_found", f"{self.href!a:.120} does not exist") from error
        if info is None:
            raise Quarantine("bad_href", f"{self.href!a:.120} is not below the catalogue's folder")
        if not stat.S_ISREG(info.st_mode):
            raise Quarantine("not_found", f"{self.href!a:.120} is no file")
        return path, info.st_size, f"{info.st_size}-{info.st_mtime_ns}"
