"""The URL policy: which addresses may be read, with which credentials, and how they are signed.

An item's hrefs are untrusted. They could point a worker at its own machine or its private network,
directly or by a redirect. So each address is checked before it is requested, and so is the target
of every redirect.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote
from urllib.request import getproxies

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from data_catalog.errors import UsageError
from data_catalog.redaction import resolve
from data_catalog.sources import Source
from geofm.config.credentials import base_address
from geofm.config.recipe import SearchSettings
from geofm.remote.quarantine import Quarantine

#: Environment variable with the embedded planet's address, for readers in other processes.
PLANET_ENV = "GEOFM_PLANET_URL"

PORTS = {"http": 80, "https": 443}
#: Longest address that is requested (characters).
MAX_URL = 8192
_AUTHORITY = re.compile(r"(https?)://([^/?#]*)", re.IGNORECASE)
#: Characters that parsers of the host read differently: a backslash, a space, a second ``@``.
_AMBIGUOUS = re.compile(r"[\\\s]|@.*@")
#: A host with letters beyond ASCII consists of letters, digits and hyphens once it is encoded.
_LDH_HOST = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.?)+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_BUCKET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{0,62})/(.+)", re.DOTALL)
#: Public IPv6 addresses are in here, except for IPv4 addresses in the prefix of NAT64.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: Networks without public hosts: special purposes by IANA, clouds' metadata services, relays.
_SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32",
        "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24",
        "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
        "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Access:
    """How a run may read assets.

    Attributes:
        stac: Address of the catalogue that lists them, or ``planet``; it may hold references to
            credentials (``credentials.py``), but no secret.
        allow_hosts: The only hosts to read from, patterns with ``*``; if empty, every public one.
        retries: Attempts after the first for failures that may pass.
        timeout_s: Network timeout, seconds.
        whole_max: Assets up to this size (bytes) are read whole and hashed.
        requests_per_s: Requests per second to one host from one process; None for no limit.
        credentials_for: Buckets, or ``bucket/prefix``, for which AWS credentials may be used.
    """

    stac: str
    allow_hosts: tuple[str, ...] = ()
    retries: int = 5
    timeout_s: float = 30.0
    whole_max: int = 64 * 2**20
    requests_per_s: float | None = None
    credentials_for: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """Address of the catalogue itself, without references to credentials."""
        return os.environ.get(PLANET_ENV, "") if self.stac == "planet" else base_address(self.stac)

    @property
    def home(self) -> str:
        """Origin (``host:port``) of the catalogue itself, where most of its links lead."""
        return origin(self.base) if scheme_of(self.base) in PORTS else ""

    def is_home(self, origin: str) -> bool:
        """Return whether an origin is the catalogue's server; http and https are the same one."""
        host, _, port = origin.rpartition(":")
        own, _, own_port = self.home.rpartition(":")
        return host == own and (port == own_port or {port, own_port} == {"80", "443"})


def catalogue_access(settings: SearchSettings) -> Access:
    """Return how the catalogue is read: its own server always, others by the host policy."""
    access = Access(settings.stac, credentials_for=tuple(settings.credentials_for))
    if not settings.allow_hosts:
        return access
    bucket = _BUCKET.fullmatch(settings.stac)
    own = f"s3://{bucket[1]}" if bucket else access.home
    return replace(access, allow_hosts=(*filter(None, (own,)), *settings.allow_hosts))


@dataclass(frozen=True)
class Signing:
    """How the assets of a source are accessed.

    Attributes:
        url: Address of the signing service, with ``{href}`` (and ``{api}``); empty for none.
        always: Sign before every read, not only after a refusal.
        requester_pays: The reader of a bucket pays.
        endpoint: Address of the S3 service; empty for AWS.
        region: Region of the buckets; empty if the client detects it.
        credentials_for: Buckets, or ``bucket/prefix``, for which AWS credentials may be used.
    """

    url: str = ""
    always: bool = False
    requester_pays: bool = False
    endpoint: str = ""
    region: str = ""
    credentials_for: tuple[str, ...] = ()


def signing_of(source: Source) -> Signing:
    """Return how a source profile has its assets accessed."""
    return Signing(
        source.sign,
        source.sign_when == "always",
        source.requester_pays,
        source.endpoint,
        source.region,
        source.credentials_for,
    )


def s3_options(signing: Signing, credentials: bool = True) -> tuple[bool, bool, str, str]:
    """Return anonymous, requester pays, endpoint and region; the environment overrides the profile.

    Args:
        signing: Settings of the source profile.
        credentials: AWS credentials may be used for the bucket.
    """
    variable = os.environ.get
    never = variable("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")
    anonymous = never or not credentials
    payer = variable("AWS_REQUEST_PAYER")
    pays = signing.requester_pays if payer is None else payer == "requester"
    endpoint = variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL") or signing.endpoint
    region = variable("AWS_REGION") or variable("AWS_DEFAULT_REGION") or signing.region
    return anonymous, pays and not anonymous, endpoint, region


def credentials_allowed(href: str, access: Access, signing: Signing) -> bool:
    """Return whether the user's AWS credentials may be used to read an ``s3://`` address.

    They are used for buckets that the source profile or ``search.credentials_for`` names, and
    below the folder of a catalogue that is in a bucket itself. Otherwise an item could have any
    bucket read to which the user has access.
    """
    bucket = _BUCKET.fullmatch(href)
    if bucket is None:
        return False
    named = [*signing.credentials_for, *access.credentials_for]
    if scheme_of(access.stac) == "s3":
        named.append(access.stac.rpartition("/")[0])
    return any(_covers(pattern, bucket[1], bucket[2]) for pattern in named)


def _covers(pattern: str, bucket: str, key: str) -> bool:
    """Return whether ``bucket`` or ``bucket/prefix`` covers a key; ``*`` matches in the bucket."""
    name, _, prefix = pattern.removeprefix("s3://").partition("/")
    if not fnmatchcase(bucket, name):
        return False
    prefix = prefix.rstrip("/*")
    if not prefix:
        return True
    steps = key.split("/")
    return (key == prefix or key.startswith(prefix + "/")) and not {".", ".."} & set(steps)


class HttpUrl(NamedTuple):
    """An HTTP address as it will be requested.

    Attributes:
        scheme: ``http`` or ``https``.
        host: Lower-case ASCII name or IP address, without brackets.
        port: Port, never 0.
        target: Percent-encoded path and query.
    """

    scheme: str
    host: str
    port: int
    target: str


@lru_cache(maxsize=4096)
def parse_http_url(url: str) -> HttpUrl:
    """Parse an HTTP address; this is the only parser, for the policy and for the connection.

    Addresses that parsers read differently are refused: a backslash, a space or a second ``@`` in
    the authority, and a host that is percent-encoded or has a zone. User names and fragments are
    dropped.

    Raises:
        Quarantine: ``bad_scheme`` for other schemes, ``bad_href`` for an address without a valid
            host and port.
    """
    check_text(url)
    found = _AUTHORITY.match(url)
    if found is None:
        raise Quarantine("bad_scheme", f"no http address: {url!a:.80}")
    scheme, authority = found[1].lower(), found[2]
    if _AMBIGUOUS.search(authority) or "%" in authority.rpartition("@")[2]:
        raise Quarantine("bad_href", f"no host and port: {url!a:.80}")
    try:
        parts = parse_url(url)
        host = (parts.host or "").lower().removeprefix("[").removesuffix("]")
        host.encode("idna")  # the resolver does the same: no empty label and none that is too long
    except (LocationParseError, ValueError) as error:
        raise Quarantine("bad_href", f"no address: {url!a:.80}") from error
    if not host:
        raise Quarantine("bad_scheme", f"no http address: {url!a:.80}")
    port = PORTS[scheme] if parts.port is None else parts.port
    valid = _HOST if authority.isascii() else _LDH_HOST
    if not valid.fullmatch(host) or port == 0:
        raise Quarantine("bad_href", f"no host and port: {url!a:.80}")
    return HttpUrl(scheme, host, port, parts.request_uri)


def origin(url: str) -> str:
    """Return ``host:port`` of an HTTP address.

    Raises:
        Quarantine: As `parse_http_url`.
    """
    parts = parse_http_url(url)
    return f"{parts.host}:{parts.port}"


def check_text(url: str) -> None:
    """Check that an address is not too long and has no control characters.

    Raises:
        Quarantine: ``bad_href``.
    """
    if len(url) > MAX_URL or any(c < " " or c == "\x7f" for c in url):
        raise Quarantine("bad_href", f"too long, or with control characters: {url!a:.80}")


def locate(href: str, access: Access) -> str:
    """Return the http(s) or s3 address of a stored href, once the policy allows it.

    Raises:
        Quarantine: ``bad_scheme``, ``bad_href`` or ``host_refused``.
    """
    scheme = scheme_of(href)
    if scheme == "planet" and access.stac == "planet":
        base = os.environ.get(PLANET_ENV, "")
        if not base:
            raise Quarantine("unreachable", f"{PLANET_ENV} is not set: no planet runs", True)
        url = base.rstrip("/") + "/" + href.removeprefix("planet:").lstrip("/")
        check_host(url, access)
        return url
    if scheme == "s3":
        check_bucket(href, access)
        return href
    if scheme not in PORTS:
        raise Quarantine("bad_scheme", f"only http, https and s3 are read, not {href!a:.80}")
    check_host(href, access)
    return href


def check_bucket(href: str, access: Access) -> None:
    """Check a bucket against the allow-list, as ``s3://bucket``; without a list all are allowed."""
    check_text(href)
    found = _BUCKET.fullmatch(href)
    if found is None:
        raise Quarantine("bad_href", f"no s3://bucket/key: {href!a:.80}")
    bucket = f"s3://{found[1]}"
    if access.allow_hosts and not matches(bucket, access.allow_hosts):
        raise Quarantine("host_refused", f"{bucket} is not in search.allow_hosts")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


def check_host(url: str, access: Access) -> None:
    """Check a host against the allow-list; without one, it has to be public or the catalogue's.

    Raises:
        Quarantine: ``host_refused``, or ``unreachable`` for a name that does not resolve.
    """
    host_port = origin(url)
    host = host_port.rpartition(":")[0]
    if access.stac == "planet" and host_port == access.home:
        return
    if access.allow_hosts:
        if not (matches(host, access.allow_hosts) or matches(host_port, access.allow_hosts)):
            raise Quarantine("host_refused", f"{host_port} is not in search.allow_hosts")
        return
    if access.is_home(host_port):
        return
    if any(not is_public(address) for address in addresses(host)):
        raise Quarantine(
            "host_refused",
            f"{host_port} is an address of this machine or of a private network; "
            "name the host in search.allow_hosts if that is meant",
        )


def check_redirect(url: str, target: str, access: Access) -> str:
    """Check the target of a redirect or link, and return the address to request.

    A target with http on the host of an https address is requested by https.

    Raises:
        Quarantine: The host policy refuses the target, or it leaves https.
    """
    if scheme_of(url) == "https" and scheme_of(target) == "http":
        host, _, port = origin(target).rpartition(":")
        if host != origin(url).rpartition(":")[0] or port != "80":
            raise Quarantine("host_refused", f"a redirect leaves https for {origin(target)}")
        target = parse_url(target)._replace(scheme="https", port=parse_url(url).port).url
    check_host(target, access)
    return target


def addresses(host: str) -> list[str]:
    """Resolve a host to its IP addresses.

    Raises:
        Quarantine: ``unreachable`` if the name does not resolve. ``host_refused`` if there is a
            proxy that may resolve it: to any address, such as a cloud's metadata service.
    """
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if set(getproxies()) - {"no"}:
            raise Quarantine(
                "host_refused",
                f"the host {host!a:.80} is not known here and only a proxy could resolve it; name "
                "it in search.allow_hosts if it may be read",
            ) from error
        raise Quarantine("unreachable", f"the host {host!a:.80} does not resolve", True) from error
    return sorted({str(entry[4][0]) for entry in entries})


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet; IPv4 inside IPv6 is unwrapped."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST:
            return False
    return not any(ip in network for network in _SPECIAL)


def sign_url(href: str, signing: Signing, access: Access) -> str:
    """Return the address that signs an href, or empty; a catalogue signs only its own host.

    Raises:
        UsageError: The profile's address refers to an environment variable that is not set.
    """
    if not signing.url:
        return ""
    if "{api}" in signing.url and (access.stac == "planet" or origin(href) != access.home):
        return ""
    try:
        url = resolve(signing.url, lambda secret: quote(secret, safe=""))
    except KeyError as error:
        raise UsageError(
            f"`sign` of the source profile refers to ${{{error.args[0]}}}, which is not set: set "
            "this environment variable where geofm and its workers run"
        ) from None
    return url.replace("{api}", access.base.rstrip("/")).replace("{href}", quote(href, safe=""))


def scheme_of(href: str) -> str:
    """Return the scheme of an address in lower case; empty for a plain path."""
    found = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", href)
    return found[1].lower() if found else ""
