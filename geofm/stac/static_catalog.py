"""A static catalogue: JSON files that link to each other, on a web server, in a bucket or a folder.

Nobody searches it for us, so all of it is read. Links are followed within the catalogue's own
server, bucket or folder, to a bounded depth and number; one that leads nowhere becomes a row.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from data_catalog.errors import RunError, UsageError
from data_catalog.progress import tick
from data_catalog.redaction import without_secrets, without_secrets_in
from geofm.remote.assets import SCHEME, folder_of, is_local, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access, scheme_of
from geofm.stac.api_client import has_name, same_server
from geofm.stac.canonical_item import Frozen, broken_link, frozen_item
from geofm.stac.query import Query, asked_for
from geofm.types import Json

log = logging.getLogger("geofm.search")

MAX_DEPTH = 12
MAX_DOCUMENTS = 1_000_000
MAX_BYTES = 64 * 2**20
READERS = 8
ROOTS = ("catalog.json", "collection.json")
#: What reading somebody's JSON as links may raise.
_STRANGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Place:
    """A document that is linked to: its address, the collection it lies in, and how deep."""

    address: str
    collection: str
    depth: int


@dataclass
class Walk:
    """What a walk has found so far; ``access`` says how its files may be read."""

    root: str
    wanted: list[str]
    access: Access | None = None
    items: list[Any] = field(default_factory=list)
    broken: list[Frozen] = field(default_factory=list)
    collections: dict[str, Json] = field(default_factory=dict)


def root_of(stac: str) -> str:
    """The catalogue's root file; a local folder's is its catalog.json or collection.json."""
    path = Path(stac)
    if not is_local(stac) or not path.is_dir():
        return stac
    found = next((path / name for name in ROOTS if (path / name).is_file()), None)
    if found is None:
        raise UsageError(f"search.stac: the folder {stac} has neither {ROOTS[0]} nor {ROOTS[1]}")
    return str(found)


def read_file(address: str, root: str, most: int, access: Access | None = None) -> bytes:
    """A file of a catalogue, by http(s), s3 or from its own folder.

    Args:
        address: of the file.
        root: address of the catalogue's root file.
        most: bytes that it may have.
        access: how it may be read; by default as the host policy allows.

    Raises:
        Quarantine: when it can't be read, or has more than ``most`` bytes.
    """
    href = address
    if is_local(root):
        href = f"{SCHEME}:" + address.removeprefix(folder_of(root))
    piece = remote(href, access or Access(root)).whole(most)
    if piece is None:
        raise Quarantine("item_too_large", f"it has more than {most} bytes")
    return piece.data


def join(base: str, href: str) -> str:
    """The address that a link or an asset's href means, seen from the file it is written in."""
    if scheme_of(href) == "file" and is_local(base):
        return posixpath.normpath(unquote(urlsplit(href).path))
    if scheme_of(href):
        return href
    if is_local(base):
        return posixpath.normpath(posixpath.join(posixpath.dirname(base), href))
    if scheme_of(base) == "s3":
        bucket, _, key = base.removeprefix("s3://").partition("/")
        inner = posixpath.normpath(posixpath.join("/" + posixpath.dirname(key), href))
        return f"s3://{bucket}/{inner.lstrip('/')}"
    return urljoin(base, href)


def belongs(root: str, address: str) -> bool:
    """Whether an address lies on the catalogue's own server, in its bucket or below its folder."""
    if is_local(root):
        return address.startswith(folder_of(root) + "/")
    if scheme_of(root) == "s3":
        return address.startswith(root[: root.index("/", 5) + 1])
    return scheme_of(address) in ("http", "https") and same_server(root, address)


def walk_catalogue(stac: str, wanted: list[str], access: Access | None = None) -> Walk:
    """Read a whole static catalogue, level by level; ``wanted`` collections only, if any.

    Args:
        stac: its address.
        wanted: ids of collections; empty for all.
        access: how its files may be read.

    Raises:
        RunError: the root can't be read, a file can't be read just now, or there is no end.
    """
    found = Walk(root_of(stac), wanted, access)
    seen = {found.root}
    level, documents = [Place(found.root, "", 0)], 0
    with ThreadPoolExecutor(READERS) as readers:
        while level:
            documents += len(level)
            if documents > MAX_DOCUMENTS:
                raise RunError(f"{stac} has more than {MAX_DOCUMENTS} files; search a part of it")
            following: list[Place] = []
            for number, (place, content) in enumerate(
                zip(level, readers.map(lambda p: _document(found, p), level), strict=True)
            ):
                following += _take(found, place, content)
                tick("search", number + 1, len(level), f"files read, {len(found.items)} items")
            level = []
            for place in following:
                if place.address not in seen:
                    seen.add(place.address)
                    level.append(place)
    return found


def _document(found: Walk, place: Place) -> Json | Quarantine:
    """One JSON file, or why it can't be used."""
    try:
        content = json.loads(read_file(place.address, found.root, MAX_BYTES, found.access))
    except Quarantine as problem:
        if problem.passing or place.depth == 0:
            raise RunError(
                f"{place.address} of the catalogue cannot be read ({problem.detail}); check "
                "search.stac, or run again later"
            ) from problem
        return problem
    except (ValueError, RecursionError) as error:
        if place.depth == 0:
            raise RunError(f"{place.address} is no JSON; check search.stac") from error
        return Quarantine("not_json", "it is no JSON")
    return content if isinstance(content, dict) else Quarantine("not_json", "it is no JSON object")


def _take(found: Walk, place: Place, content: Json | Quarantine) -> list[Place]:
    """Note what a document holds; returns the places it links to."""
    if isinstance(content, Quarantine):
        _broken(found, place.address, place.collection, content)
        return []
    if content.get("type") == "Feature":
        take_item(found, content, place)
        return []
    if content.get("type") == "FeatureCollection":
        features = content.get("features")
        for item in features if isinstance(features, list) else []:
            take_item(found, item, place)
        return []
    name, collection = content.get("id"), place.collection
    if content.get("type") == "Collection" or "extent" in content:
        if not has_name(content):
            return []
        found.collections.setdefault(str(name), without_secrets_in(content))
        collection = str(name)
        if found.wanted and collection not in found.wanted:
            return []
    elif place.depth == 0:
        collection = str(name) if has_name(content) else "catalog"
    return list(_links(found, content, replace(place, collection=collection)))


def take_item(found: Walk, item: Any, place: Place) -> None:
    """Note an item with its collection and with hrefs that no longer depend on where it was read.

    An item that names none is of the collection it lies in, or of the root catalogue.
    """
    if isinstance(item, dict):
        if item.get("collection") is None:
            item = {**item, "collection": place.collection or "catalog"}
        named = item["collection"]
        if isinstance(named, str) and named not in found.collections and has_name({"id": named}):
            found.collections[named] = {"id": named}
        assets = item.get("assets")
        if isinstance(assets, dict):
            whole = {key: _absolute(one, place.address) for key, one in assets.items()}
            item = {**item, "assets": whole}
    found.items.append(item)


def _absolute(asset: Any, base: str) -> Any:
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        return asset
    try:
        return {**asset, "href": join(base, asset["href"])}
    except ValueError:  # not an address at all; the checks say so
        return asset


def _links(found: Walk, content: Json, place: Place) -> Iterator[Place]:
    """The children and items that a catalogue links to."""
    links = content.get("links")
    for link in links if isinstance(links, list) else []:
        try:
            rel, href = link["rel"], link["href"]
            if rel not in ("child", "item", "items"):
                continue
            address = join(place.address, href).partition("#")[0]
            inside = belongs(found.root, address)
        except _STRANGE:
            _broken(found, place.address, place.collection, Quarantine("bad_href", "no address"))
            continue
        if not inside:
            problem = Quarantine("host_refused", "it is not of this catalogue's own server")
        elif place.depth >= MAX_DEPTH:
            problem = Quarantine("too_deep", f"it is {MAX_DEPTH + 1} links below the root")
        else:
            yield Place(address, place.collection, place.depth + 1)
            continue
        _broken(found, address, place.collection, problem)


def _broken(found: Walk, address: str, collection: str, problem: Quarantine) -> None:
    """A link that leads nowhere: named from the catalogue's root on, as that may be moved."""
    base = found.root.rpartition("/")[0] + "/"
    one = broken_link(without_secrets(address.removeprefix(base)), collection, problem)
    log.warning("search: %s", one.problem.detail if one.problem else "")
    found.broken.append(one)


def select(found: Walk, query: Query, max_items: int) -> list[Frozen]:
    """The items of a walk that are asked for, frozen, and a row for each broken link.

    Args:
        found: what was read.
        query: with the collections that are searched.
        max_items: more than these are an error.

    Raises:
        UsageError: there are more.
    """
    base = folder_of(found.root) if is_local(found.root) else ""
    others = set(found.collections) - set(query.collections)
    listed = [
        frozen_item(item, base, SCHEME)
        for item in found.items
        if asked_for(item, query)
        and not (isinstance(item, dict) and str(item.get("collection")) in others)
    ]
    if len(listed) > max_items:
        raise UsageError(
            f"more than search.max_items = {max_items} items match; raise it, or narrow "
            "search.bbox, search.datetime or search.collections"
        )
    return [*listed, *found.broken]
