"""Bytes of S3 objects in bulk: ranges and uploads through obstore.

s3fs stays the file system of a store: it lists, copies and removes objects. Where many bytes move,
obstore needs a fifth of its processor time and a tenth of its memory.

obstore must not be used in a forked process whose parent has used it: its threads do not survive
the fork, and the call would never return. It also can't address some keys that S3 allows (an empty
step as in ``a//b``, or the steps ``.`` and ``..``), and can't replace the public certificates by
those of ``AWS_CA_BUNDLE``. ``read_object`` and ``upload_file`` then use s3fs, which gives the same
bytes and the same errors.

obstore does not read profiles of ``~/.aws``. Endpoint, region and credentials are therefore those
that botocore resolves for the s3fs client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from upath import UPath

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential, S3Store

T = TypeVar("T")
#: Bytes of a part of an upload, and how many parts are in flight.
PART_BYTES, PARTS_IN_FLIGHT = 8 * 2**20, 4
#: Most parts that S3 allows for one object.
MAX_PARTS = 10_000
#: Retries of a request of an upload. Reads have none here: their callers retry.
UPLOAD_RETRIES = 10
#: Seconds to wait for a connection, or for the next bytes of an answer.
TIMEOUT_S = 60.0
#: Seconds that a whole request may take, whatever its size.
REQUEST_S = 3600.0
#: Seconds after which credentials are taken from botocore again, which renews those that expire.
CREDENTIALS_S = 300.0
#: A regional or global address of S3 itself; all others are used as they are.
_AWS_HOST = re.compile(r"s3(?:\.[a-z0-9-]+)?\.amazonaws\.com")
#: obstore's messages about a server that does not serve ranges.
_NO_RANGES = re.compile("non-partial response|Content-Range header|CONTENT_RANGE header")
_ERROR_CODE = re.compile(r"<Code>(\w+)</Code>")
#: Codes of refusals, with whatever status they come.
_DENIED = ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")

#: The process that has started obstore's threads; forked children inherit the number.
_owner: int | None = None
#: Regions of buckets of AWS.
_regions: dict[str, str] = {}


class _Service(NamedTuple):
    """How an s3fs file system reaches S3.

    Attributes:
        endpoint: Address of the service; empty for the regional address of AWS.
        region: Region; may be empty.
        virtual_host: The bucket's name is a part of the host's name.
        anonymous: Requests are not signed.
        requester_pays: The reader of a bucket pays.
        profile: Profile of ``~/.aws``, if one was given to s3fs.
        keys: Access key, secret and token, if they were given to s3fs.
    """

    endpoint: str
    region: str
    virtual_host: bool
    anonymous: bool
    requester_pays: bool
    profile: str | None
    keys: tuple[str | None, str | None, str | None]


class ObjectRange(NamedTuple):
    """Bytes of an object, with the size and the ETag of the whole object from the same answer."""

    data: bytes
    total: int
    etag: str


class OutsideObject(OSError):
    """A range begins at the end of the object or after it."""


class NoRanges(OSError):
    """The server ignores ranges, or does not say which one its answer is."""


def is_s3(path: UPath) -> bool:
    """Return whether a path is in an S3 bucket."""
    return path.protocol in ("s3", "s3a")


def read_object(
    files: Any, address: str, start: int, end: int, timeout_s: float = TIMEOUT_S
) -> ObjectRange:
    """Read a range of an object in one request.

    Args:
        files: s3fs file system, which knows endpoint and credentials.
        address: ``bucket/key``, or the same with ``s3://`` before it.
        start: First byte.
        end: Last byte + 1; the range ends with the object if that is shorter.
        timeout_s: Seconds to wait for a connection or for the next bytes.

    Raises:
        FileNotFoundError: There is no such object or bucket.
        PermissionError: The credentials do not allow it, or are not valid.
        botocore.exceptions.NoCredentialsError: There are no credentials.
        OutsideObject: The object ends before ``start``.
        NoRanges: The server does not serve ranges.
        OSError, botocore.exceptions.BotoCoreError: All other failures, which may pass.
    """
    bucket, key, _ = files.split_path(address)
    store = _bucket(files, bucket, 0, timeout_s) if _addressable(key) else None
    if store is None:
        return _read_by_s3fs(files, bucket, key, start, end)

    def read() -> ObjectRange:
        answer = store.get(key, options={"range": (start, end)})
        data = answer.bytes().to_bytes()
        return ObjectRange(data, answer.meta["size"], answer.meta["e_tag"] or "")

    part = _translate_errors(read, address)
    if len(part.data) != min(end, part.total) - start:
        raise TimeoutError(f"the answer was cut short: {len(part.data)} bytes from {start}")
    return part


def _read_by_s3fs(files: Any, bucket: str, key: str, start: int, end: int) -> ObjectRange:
    """Read a range of an object through s3fs."""
    from fsspec.asyn import sync

    span = f"bytes={start}-{end - 1}"
    try:
        answer = files.call_s3("get_object", Bucket=bucket, Key=key, Range=span)
    except OSError as error:
        if error_code(error) in ("InvalidRange", "416"):
            raise OutsideObject(f"{bucket}/{key} ends before byte {start}") from error
        raise

    async def body() -> bytes | None:
        async with answer["Body"] as stream:  # which closes the connection
            data: bytes | None = await stream.read() if total.isdigit() else None
            return data

    total = answer.get("ContentRange", "").rpartition("/")[2]
    data = sync(files.loop, body)
    if data is None:
        raise NoRanges(f"{bucket}/{key}: the answer to a range does not state the object's size")
    if len(data) != min(end, int(total)) - start:
        raise TimeoutError(f"the answer was cut short: {len(data)} bytes from {start}")
    return ObjectRange(data, int(total), answer.get("ETag", ""))


def upload_file(source: Path, target: UPath) -> None:
    """Copy a local file to an object store; a reader sees all of it or nothing.

    A large file goes up in parts, so memory holds ``PARTS_IN_FLIGHT`` of them. If the process dies,
    S3 keeps the parts that went up (they are no object) until a lifecycle rule removes them.

    Raises:
        PermissionError: The credentials do not allow it.
        OSError: All other failures.
    """
    files = target.fs
    size = source.stat().st_size
    part = max(PART_BYTES, -(-size // MAX_PARTS))
    if not is_s3(target):
        files.put_file(str(source), target.path)
        return
    bucket, key, _ = files.split_path(target.path)
    # such settings (encryption, access lists) have no equal in obstore
    plain = not files.s3_additional_kwargs and _addressable(key)
    store = _bucket(files, bucket, UPLOAD_RETRIES, TIMEOUT_S) if plain else None
    if store is None:
        files.put_file(str(source), target.path, chunksize=part, max_concurrency=PARTS_IN_FLIGHT)
        return
    _translate_errors(
        lambda: store.put(key, source, chunk_size=part, max_concurrency=PARTS_IN_FLIGHT),
        str(target),
    )
    files.invalidate_cache(target.path)  # a listing from before does not have it


def error_code(error: BaseException) -> str:
    """Return the object store's code of an error that s3fs has translated; empty without one."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _addressable(key: str) -> bool:
    """Return whether obstore can address a key."""
    return not {"", ".", ".."} & set(key.split("/"))


def _bucket(files: Any, bucket: str, retries: int, timeout_s: float) -> S3Store | None:
    """Return obstore's client of a bucket; None where it can't be used."""
    global _owner  # noqa: PLW0603
    if _owner not in (None, os.getpid()):
        return None
    _owner = os.getpid()
    about = files.s3.meta  # of the botocore client, which has read the variables and the profile
    endpoint, region = str(about.endpoint_url), str(about.region_name or "")
    if _AWS_HOST.fullmatch(urlsplit(endpoint).netloc):
        endpoint, region = "", _region_of(files, bucket, region)
    return _open_bucket(
        bucket,
        _Service(
            endpoint,
            region,
            (about.config.s3 or {}).get("addressing_style") == "virtual",
            files.anon,
            bool(files.req_kw),
            files.kwargs.get("profile"),
            (files.key, files.secret, files.token),
        ),
        retries,
        timeout_s,
    )


@lru_cache(maxsize=64)
def _open_bucket(bucket: str, service: _Service, retries: int, timeout_s: float) -> S3Store | None:
    """Make obstore's client of a bucket; None if it can't use the configured certificates."""
    import botocore.session  # loads slowly, and local stores do not need it
    from obstore.store import S3Store

    session = botocore.session.Session(profile=service.profile)
    if not service.endpoint.startswith("http://") and session.get_config_variable("ca_bundle"):
        # The bundle is to replace the public certificates. obstore would still accept those.
        return None
    config: S3Config = {"request_payer": service.requester_pays}
    config["region"] = service.region if service.region not in ("", "aws-global") else "us-east-1"
    endpoint = service.endpoint
    if endpoint and service.virtual_host:
        endpoint = endpoint.replace("://", f"://{bucket}.", 1)
        config["virtual_hosted_style_request"] = True
    if endpoint:
        config["endpoint"] = endpoint
    client: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=timeout_s),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": timedelta(seconds=REQUEST_S),
    }
    if service.anonymous:
        config["skip_signature"] = True
    return S3Store(
        bucket,
        config=config,
        client_options=client,
        retry_config={"max_retries": retries},
        credential_provider=None if service.anonymous else _credentials(service, session),
    )


def _credentials(service: _Service, session: Any) -> Callable[[], S3Credential]:
    """Return a function that gives botocore's credentials, renewed if need be.

    Raises:
        botocore.exceptions.NoCredentialsError: There are none.
    """
    key, secret, token = service.keys
    if key and secret:
        session.set_credentials(key, secret, token)
    credentials = session.get_credentials()
    if credentials is None:
        from botocore.exceptions import NoCredentialsError

        raise NoCredentialsError

    def current() -> S3Credential:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S),
        }

    return current


def _region_of(files: Any, bucket: str, configured: str) -> str:
    """Ask S3 for the region of a bucket, once if it says; else return the configured region.

    botocore follows S3 to the bucket's region by itself; obstore does not.
    """
    region = _regions.get(bucket)
    if region is None:
        try:
            answer = files.call_s3("head_bucket", Bucket=bucket)
        except OSError as error:  # a refusal names the region as well
            answer = getattr(error.__cause__, "response", None) or {}
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = str(headers.get("x-amz-bucket-region") or "")
        if not region:  # the request failed: the next one may not
            return configured
        _regions[bucket] = region
    return region


def _translate_errors(call: Callable[[], T], address: str) -> T:
    """Call obstore; its errors become those that s3fs raises."""
    from obstore import exceptions

    try:
        return call()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} does not exist") from error
    except exceptions.BaseError as error:
        code = _ERROR_CODE.search(str(error))
        reason = str(error).partition("\n")[0]
        if code is not None and code[1] == "InvalidRange":
            raise OutsideObject(f"{address} ends before the range") from error
        if code is None and _NO_RANGES.search(reason):
            raise NoRanges(f"{address}: {reason}") from error
        denied = isinstance(
            error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
        )
        if denied or (code is not None and code[1] in _DENIED):
            raise PermissionError(f"{code[1] if code else reason}: {address}") from error
        raise OSError(f"{code[1]}: {reason}" if code else reason) from error
