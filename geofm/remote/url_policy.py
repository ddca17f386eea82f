"""Which addresses may be asked for pixels, and how an address is signed.

An item's hrefs were written by a stranger. Left alone they could point a worker at the machine it
runs on or at its private network, directly or by a redirect, so each address is checked before it
is asked, every hop of a redirect included.
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

#: Address of the embedded planet, where readers in other processes find it, too.
PLANET_ENV = "GEOFM_PLANET_URL"

PORTS = {"http": 80, "https": 443}
#: Longest address (characters) that is asked.
MAX_URL = 8192
_AUTHORITY = re.compile(r"(https?)://([^/?#]*)", re.IGNORECASE)
#: What makes parsers disagree about the host: a backslash, a space, a second ``@``.
_AMBIGUOUS = re.compile(r"[\\\s]|@.*@")
#: A host with letters beyond ASCII consists of letters, digits and hyphens once it is encoded.
_LDH_HOST = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.?)+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_BUCKET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{0,62})/(.+)", re.DOTALL)
#: IPv6 addresses are public only in here, but for IPv4 addresses in NAT64's own prefix.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: Addresses that no public host has: special purposes by IANA, metadata services of clouds, relays.
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
        stac: address of the STAC API that listed them, or ``planet``; it may hold references to
            credentials (``credentials.py``), but no secret.
        allow_hosts: the only hosts to read from (``*`` matches); empty for any public one.
        retries: attempts after the first for faults that pass.
        timeout_s: network timeout, seconds.
        whole_max: assets up to this size (bytes) are read whole and hashed.
        requests_per_s: most requests a second to one host from one process; None for any number.
        credentials_for: buckets, or ``bucket/prefix``, that AWS credentials may be used for.
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
        """Origin (``host:port``) of the catalogue itself, to which its links may well lead."""
        return origin(self.base) if scheme_of(self.base) in PORTS else ""

    def is_home(self, place: str) -> bool:
        """Whether an origin is the catalogue's own server; http and https are one server."""
        host, _, port = place.rpartition(":")
        own, _, own_port = self.home.rpartition(":")
        return host == own and (port == own_port or {port, own_port} == {"80", "443"})


def catalogue_access(settings: SearchSettings) -> Access:
    """How the catalogue itself may be read: its own server always, others by the host policy."""
    access = Access(settings.stac, credentials_for=tuple(settings.credentials_for))
    if not settings.allow_hosts:
        return access
    bucket = _BUCKET.fullmatch(settings.stac)
    own = f"s3://{bucket[1]}" if bucket else access.home
    return replace(access, allow_hosts=(*filter(None, (own,)), *settings.allow_hosts))


@dataclass(frozen=True)
class Signing:
    """How a source lets its assets be read.

    Attributes:
        url: address that signs, with ``{href}`` (and ``{api}``); empty where nothing is signed.
        always: sign before every read, not only what is refused.
        requester_pays: the reader of a bucket pays.
        endpoint: address of the S3 service; empty for AWS.
        region: region of the buckets; empty where the client finds out.
        credentials_for: buckets, or ``bucket/prefix``, that AWS credentials may be used for.
    """

    url: str = ""
    always: bool = False
    requester_pays: bool = False
    endpoint: str = ""
    region: str = ""
    credentials_for: tuple[str, ...] = ()


def signing_of(source: Source) -> Signing:
    """What a source profile says of reaching its assets."""
    return Signing(
        source.sign,
        source.sign_when == "always",
        source.requester_pays,
        source.endpoint,
        source.region,
        source.credentials_for,
    )


def s3_options(signing: Signing, credentials: bool = True) -> tuple[bool, bool, str, str]:
    """Anonymous, requester pays, endpoint, region: as the environment says, else the profile.

    Args:
        signing: of the source profile.
        credentials: whether AWS credentials may be used for the bucket.
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
    """Whether the user's AWS credentials may be used to read an ``s3://`` address.

    They are used for buckets that the source profile or ``search.credentials_for`` names, and
    below the folder of a catalogue that lies in a bucket itself. An item could otherwise have any
    bucket read that the user can read.
    """
    found = _BUCKET.fullmatch(href)
    if found is None:
        return False
    named = [*signing.credentials_for, *access.credentials_for]
    if scheme_of(access.stac) == "s3":
        named.append(access.stac.rpartition("/")[0])
    return any(_names(pattern, found[1], found[2]) for pattern in named)


def _names(pattern: str, bucket: str, key: str) -> bool:
    """Whether ``bucket`` or ``bucket/prefix`` (``*`` matches in the bucket's name) covers a key."""
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
    """An address is not endless and has no control characters.

    Raises:
        Quarantine: ``bad_href``.
    """
    if len(url) > MAX_URL or any(c < " " or c == "\x7f" for c in url):
        raise Quarantine("bad_href", f"too long, or with control characters: {url!a:.80}")


def locate(href: str, access: Access) -> str:
    """The address to ask for a stored href: http(s) or s3, allowed to be read.

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
    """Buckets follow the allow-list as ``s3://bucket``; without one all are allowed."""
    check_text(href)
    found = _BUCKET.fullmatch(href)
    if found is None:
        raise Quarantine("bad_href", f"no s3://bucket/key: {href!a:.80}")
    bucket = f"s3://{found[1]}"
    if access.allow_hosts and not matches(bucket, access.allow_hosts):
        raise Quarantine("host_refused", f"{bucket} is not in search.allow_hosts")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


def check_host(url: str, access: Access) -> None:
    """Allow a host by the list; without a list, public hosts and the catalogue's own server.

    Raises:
        Quarantine: ``host_refused``; ``unreachable`` for a name that nobody knows.
    """
    place = origin(url)
    host = place.rpartition(":")[0]
    if access.stac == "planet" and place == access.home:
        return
    if access.allow_hosts:
        if not (matches(host, access.allow_hosts) or matches(place, access.allow_hosts)):
            raise Quarantine("host_refused", f"{place} is not in search.allow_hosts")
        return
    if access.is_home(place):
        return
    if any(not is_public(address) for address in addresses(host)):
        raise Quarantine(
            "host_refused",
            f"{place} is an address of this machine or of a private network; "
            "name the host in search.allow_hosts if that is meant",
        )


def check_redirect(url: str, target: str, access: Access) -> str:
    """Check an address that another one leads to; returns the one to ask.

    From https a redirect or link to http on the same host is asked by https.

    Raises:
        Quarantine: the host policy refuses it, or it leaves https.
    """
    if scheme_of(url) == "https" and scheme_of(target) == "http":
        host, _, port = origin(target).rpartition(":")
        if host != origin(url).rpartition(":")[0] or port != "80":
            raise Quarantine("host_refused", f"a redirect leaves https for {origin(target)}")
        target = parse_url(target)._replace(scheme="https", port=parse_url(url).port).url
    check_host(target, access)
    return target


def addresses(host: str) -> list[str]:
    """IP addresses of a host.

    Raises:
        Quarantine: ``unreachable`` where nobody knows the name, ``host_refused`` where perhaps
            a proxy does: it could lead anywhere, such as to a cloud's metadata service.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if set(getproxies()) - {"no"}:
            raise Quarantine(
                "host_refused",
                f"the host {host!a:.80} is not known here and only a proxy could resolve it; name "
                "it in search.allow_hosts if it may be asked",
            ) from error
        raise Quarantine("unreachable", f"nobody knows the host {host!a:.80}", True) from error
    return sorted({str(entry[4][0]) for entry in found})


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet (IPv4 inside IPv6 is looked through)."""
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
    """Address that signs ``href``, empty where nobody can: a catalogue signs only its own host.

    Raises:
        UsageError: the profile's address refers to an environment variable that is not set.
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
    """Scheme of an address in small letters, empty for a bare path."""
    found = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", href)
    return found[1].lower() if found else ""
