"""Which addresses may be asked for pixels, and how an address is signed.

An item's hrefs were written by a stranger. Left alone they could point a worker at the machine it
runs on or at its private network, directly or by a redirect, so each address is checked before it
is asked, every hop of a redirect included.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import quote, urlsplit
from urllib.request import getproxies

from geofm.imagery.items import scheme_of
from geofm.imagery.quarantine import Quarantine

PLANET_ENV = "GEOFM_PLANET_URL"
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Access:
    """How a run may read assets.

    Attributes:
        stac: address of the STAC API that listed them, or ``planet``.
        allow_hosts: the only hosts to read from (``*`` matches); empty for any public one.
        retries: attempts after the first for faults that pass.
        timeout_s: network timeout, seconds.
        whole_max: assets up to this size (bytes) are read whole and hashed.
    """

    stac: str
    allow_hosts: tuple[str, ...] = ()
    retries: int = 5
    timeout_s: float = 30.0
    whole_max: int = 64 * 2**20

    @property
    def home(self) -> str:
        """Origin (``host:port``) of the catalogue itself, which it may well point to."""
        url = os.environ.get(PLANET_ENV, "") if self.stac == "planet" else self.stac
        return origin(url) if url else ""


@dataclass(frozen=True)
class Signing:
    """How a source signs: a URL with ``{href}`` (and ``{api}``), and whether before every read."""

    url: str = ""
    always: bool = False


def origin(url: str) -> str:
    """``host:port`` of an http(s) address.

    Raises:
        Quarantine: ``bad_scheme`` when it is none.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise Quarantine("bad_scheme", f"no address: {url!a:.80}") from error
    if parts.scheme not in PORTS or not host:
        raise Quarantine("bad_scheme", f"no http address: {url!a:.80}")
    return f"{host.lower()}:{port or PORTS[parts.scheme]}"


def locate(href: str, access: Access) -> str:
    """The address to ask for a stored href: http(s) or s3, allowed to be read.

    Raises:
        Quarantine: ``bad_scheme`` or ``host_refused``.
    """
    scheme = scheme_of(href)
    if scheme == "planet" and access.stac == "planet":
        base = os.environ.get(PLANET_ENV, "")
        if not base:
            raise Quarantine("unreachable", f"{PLANET_ENV} is not set: no planet runs", True)
        return base.rstrip("/") + "/" + href.removeprefix("planet:").lstrip("/")
    if scheme == "s3":
        check_bucket(href, access)
        return href
    if scheme not in PORTS:
        raise Quarantine("bad_scheme", f"only http, https and s3 are read, not {href!a:.80}")
    check_host(href, access)
    return href


def check_bucket(href: str, access: Access) -> None:
    """Buckets follow the allow-list as ``s3://bucket``; without one all are allowed."""
    bucket = f"s3://{urlsplit(href).netloc}"
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
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return bool((inner or ip).is_global and not ip.is_multicast)


def sign_url(href: str, signing: Signing, access: Access) -> str:
    """Address that signs ``href``, empty where nobody can: a catalogue signs only its own host."""
    if not signing.url:
        return ""
    if "{api}" in signing.url and (access.stac == "planet" or origin(href) != access.home):
        return ""
    return signing.url.format(api=access.stac.rstrip("/"), href=quote(href, safe=""))
