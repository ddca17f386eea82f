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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from urllib.parse import quote
from urllib.request import getproxies

import httpx

from data_catalog.sources import Source
from geofm.imagery.items import scheme_of
from geofm.imagery.quarantine import Quarantine
from geofm.planet.serving import ADDRESS as PLANET_ENV

PORTS = {"http": 80, "https": 443}
#: Longest address (characters) that is asked.
MAX_URL = 8192
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_BUCKET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{0,62})/.+", re.DOTALL)
#: IPv6 addresses are public only in here, but for IPv4 addresses in NAT64's own prefix.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Access:
    """How a run may read assets.

    Attributes:
        stac: address of the STAC API that listed them, or ``planet``.
        allow_hosts: the only hosts to read from (``*`` matches); empty for any public one.
        retries: attempts after the first for faults that pass.
        timeout_s: network timeout, seconds.
        whole_max: assets up to this size (bytes) are read whole and hashed.
        requests_per_s: most requests a second to one host from one process; None for any number.
    """

    stac: str
    allow_hosts: tuple[str, ...] = ()
    retries: int = 5
    timeout_s: float = 30.0
    whole_max: int = 64 * 2**20
    requests_per_s: float | None = None

    @property
    def home(self) -> str:
        """Origin (``host:port``) of the catalogue itself, which it may well point to."""
        url = os.environ.get(PLANET_ENV, "") if self.stac == "planet" else self.stac
        return origin(url) if scheme_of(url) in PORTS else ""


@dataclass(frozen=True)
class Signing:
    """How a source lets its assets be read.

    Attributes:
        url: address that signs, with ``{href}`` (and ``{api}``); empty where nothing is signed.
        always: sign before every read, not only what is refused.
        requester_pays: the reader of a bucket pays.
        endpoint: address of the S3 service; empty for AWS.
        region: region of the buckets; empty where the client finds out.
    """

    url: str = ""
    always: bool = False
    requester_pays: bool = False
    endpoint: str = ""
    region: str = ""


def signing_of(source: Source) -> Signing:
    """What a source profile says of reaching its assets."""
    return Signing(
        source.sign,
        source.sign_when == "always",
        source.requester_pays,
        source.endpoint,
        source.region,
    )


def s3_options(signing: Signing) -> tuple[bool, bool, str, str]:
    """Anonymous, requester pays, endpoint, region: the environment's word, else the profile's."""
    told = os.environ.get
    anonymous = told("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1")
    payer = told("AWS_REQUEST_PAYER")
    pays = signing.requester_pays if payer is None else payer == "requester"
    endpoint = told("AWS_ENDPOINT_URL_S3") or told("AWS_ENDPOINT_URL") or signing.endpoint
    region = told("AWS_REGION") or told("AWS_DEFAULT_REGION") or signing.region
    return anonymous, pays and not anonymous, endpoint, region


@lru_cache(maxsize=4096)
def origin(url: str) -> str:
    """``host:port`` of an http(s) address, as the client that will ask it understands it.

    Raises:
        Quarantine: ``bad_scheme`` for other schemes, ``bad_href`` for what nobody can ask.
    """
    check_text(url)
    try:
        parts = httpx.URL(url)
        host = parts.raw_host.decode("ascii").lower()
        host.encode("idna")  # as the resolver will: no empty label and none that is too long
    except (httpx.InvalidURL, ValueError) as error:
        raise Quarantine("bad_href", f"no address: {url!a:.80}") from error
    if parts.scheme not in PORTS or not host:
        raise Quarantine("bad_scheme", f"no http address: {url!a:.80}")
    port = PORTS[parts.scheme] if parts.port is None else parts.port
    if not _HOST.fullmatch(host) or not 0 < port < 2**16:
        raise Quarantine("bad_href", f"no host and port: {url!a:.80}")
    return f"{host}:{port}"


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
    """Allow a host by the list; without a list, public hosts and the catalogue's own origin.

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
    if place == access.home:
        return
    if any(not is_public(address) for address in addresses(host)):
        raise Quarantine(
            "host_refused",
            f"{place} is an address of this machine or of a private network; "
            "name the host in search.allow_hosts if that is meant",
        )


def addresses(host: str) -> list[str]:
    """IP addresses of a host; none where only a proxy can resolve names."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if getproxies():
            return []
        raise Quarantine("unreachable", f"nobody knows the host {host!a:.80}", True) from error
    return sorted({str(entry[4][0]) for entry in found})


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet (IPv4 inside IPv6 is looked through)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip in _UNICAST and ip.is_global
        ip = inner
    return ip.is_global and not ip.is_multicast


def sign_url(href: str, signing: Signing, access: Access) -> str:
    """Address that signs ``href``, empty where nobody can: a catalogue signs only its own host."""
    if not signing.url:
        return ""
    if "{api}" in signing.url and (access.stac == "planet" or origin(href) != access.home):
        return ""
    return signing.url.format(api=access.stac.rstrip("/"), href=quote(href, safe=""))
