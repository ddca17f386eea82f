"""Static catalogues: JSON files that link to each other, on a web server, in a bucket or a folder.

A static catalogue has no search, so all its files are read, level by level. Links are followed only
within the catalogue's own server, bucket or folder, to a bounded depth and number. A link that
can't be followed becomes a quarantined row.
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
from geofm.stac.canonical_item import CanonicalItem, broken_link_item, canonicalize
from geofm.stac.query import Query, matches
from geofm.types import Json

log = logging.getLogger("geofm.search")

MAX_DEPTH = 12
MAX_DOCUMENTS = 1_000_000
MAX_BYTES = 64 * 2**20
READERS = 8
ROOTS = ("catalog.json", "collection.json")
#: Exceptions of reading links from JSON of unexpected types.
_LINK_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class LinkedFile:
    """A file of the catalogue: address, collection it lies in, and number of links to it."""

    address: str
    collection: str
    depth: int


@dataclass
class StaticCatalog:
    """Everything read from a static catalogue so far.

    Attributes:
        root: Address of the root file.
        wanted: Ids of the collections to read; empty for all.
        access: Rules for reading its files.
        items: Items as parsed JSON, with a collection and absolute hrefs.
        broken: Rows of links that could not be followed.
        collections: Raw JSON of the collections, by id.
    """

    root: str
    wanted: list[str]
    access: Access | None = None
    items: list[Any] = field(default_factory=list)
    broken: list[CanonicalItem] = field(default_factory=list)
    collections: dict[str, Json] = field(default_factory=dict)


def read_catalogue(stac: str, wanted: list[str], access: Access | None = None) -> StaticCatalog:
    """Read a whole static catalogue, level by level.

    Args:
        stac: Address of its root file, or a local folder.
        wanted: Ids of the collections to read; empty for all.
        access: Rules for reading its files.

    Raises:
        RunError: The root can't be read, a file fails for a passing reason, or there are more
            than ``MAX_DOCUMENTS`` files.
    """
    catalogue = StaticCatalog(root_of(stac), wanted, access)
    seen = {catalogue.root}
    level, documents = [LinkedFile(catalogue.root, "", 0)], 0
    with ThreadPoolExecutor(READERS) as readers:
        while level:
            documents += len(level)
            if documents > MAX_DOCUMENTS:
                raise RunError(f"{stac} has more than {MAX_DOCUMENTS} files; search a part of it")
            linked: list[LinkedFile] = []
            contents = readers.map(lambda file: _read_document(catalogue, file), level)
            for number, (file, content) in enumerate(zip(level, contents, strict=True)):
                linked += _add_document(catalogue, file, content)
                tick("search", number + 1, len(level), f"files read, {len(catalogue.items)} items")
            level = []
            for file in linked:
                if file.address not in seen:
                    seen.add(file.address)
                    level.append(file)
    return catalogue


def root_of(stac: str) -> str:
    """Return the root file; in a local folder it is ``catalog.json`` or ``collection.json``."""
    path = Path(stac)
    if not is_local(stac) or not path.is_dir():
        return stac
    root = next((path / name for name in ROOTS if (path / name).is_file()), None)
    if root is None:
        raise UsageError(f"search.stac: the folder {stac} has neither {ROOTS[0]} nor {ROOTS[1]}")
    return str(root)


def _read_document(catalogue: StaticCatalog, file: LinkedFile) -> Json | Quarantine:
    """Read a JSON file, or return the reason why it can't be used."""
    try:
        content = json.loads(read_file(file.address, catalogue.root, MAX_BYTES, catalogue.access))
    except Quarantine as problem:
        if problem.passing or file.depth == 0:
            raise RunError(
                f"{file.address} of the catalogue cannot be read ({problem.detail}); check "
                "search.stac, or run again later"
            ) from problem
        return problem
    except (ValueError, RecursionError) as error:
        if file.depth == 0:
            raise RunError(f"{file.address} is no JSON; check search.stac") from error
        return Quarantine("not_json", "it is no JSON")
    return content if isinstance(content, dict) else Quarantine("not_json", "it is no JSON object")


def read_file(address: str, root: str, max_bytes: int, access: Access | None = None) -> bytes:
    """Read a file of a catalogue by http(s), s3 or from the catalogue's own folder.

    Args:
        address: Address of the file.
        root: Address of the catalogue's root file.
        max_bytes: Largest size.
        access: Rules for reading it; by default those of the host policy.

    Raises:
        Quarantine: The file can't be read or is larger than ``max_bytes``.
    """
    href = address
    if is_local(root):
        href = f"{SCHEME}:" + address.removeprefix(folder_of(root))
    piece = remote(href, access or Access(root)).whole(max_bytes)
    if piece is None:
        raise Quarantine("item_too_large", f"it has more than {max_bytes} bytes")
    return piece.data


def _add_document(
    catalogue: StaticCatalog, file: LinkedFile, content: Json | Quarantine
) -> list[LinkedFile]:
    """Add the items and collections of a file; returns the files that it links to."""
    if isinstance(content, Quarantine):
        _add_broken(catalogue, file.address, file.collection, content)
        return []
    if content.get("type") == "Feature":
        add_item(catalogue, content, file)
        return []
    if content.get("type") == "FeatureCollection":
        features = content.get("features")
        for item in features if isinstance(features, list) else []:
            add_item(catalogue, item, file)
        return []
    name, collection = content.get("id"), file.collection
    if content.get("type") == "Collection" or "extent" in content:
        if not has_name(content):
            return []
        catalogue.collections.setdefault(str(name), without_secrets_in(content))
        collection = str(name)
        if catalogue.wanted and collection not in catalogue.wanted:
            return []
    elif file.depth == 0:
        collection = str(name) if has_name(content) else "catalog"
    return list(_linked_files(catalogue, content, replace(file, collection=collection)))


def add_item(catalogue: StaticCatalog, item: Any, file: LinkedFile) -> None:
    """Add an item with its collection and absolute hrefs.

    An item that names no collection belongs to the collection of its file, else to ``catalog``.
    """
    if isinstance(item, dict):
        if item.get("collection") is None:
            item = {**item, "collection": file.collection or "catalog"}
        name = item["collection"]
        if isinstance(name, str) and name not in catalogue.collections and has_name({"id": name}):
            catalogue.collections[name] = {"id": name}
        assets = item.get("assets")
        if isinstance(assets, dict):
            absolute = {key: _with_absolute_href(a, file.address) for key, a in assets.items()}
            item = {**item, "assets": absolute}
    catalogue.items.append(item)


def _with_absolute_href(asset: Any, base: str) -> Any:
    """Resolve the href of an asset; an asset without a usable href stays as it is."""
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        return asset
    try:
        return {**asset, "href": resolve_href(base, asset["href"])}
    except ValueError:  # not an address; check_item reports it
        return asset


def _linked_files(
    catalogue: StaticCatalog, content: Json, file: LinkedFile
) -> Iterator[LinkedFile]:
    """Yield the children and items that a file links to."""
    links = content.get("links")
    for link in links if isinstance(links, list) else []:
        try:
            rel, href = link["rel"], link["href"]
            if rel not in ("child", "item", "items"):
                continue
            address = resolve_href(file.address, href).partition("#")[0]
            inside = lies_within(catalogue.root, address)
        except _LINK_ERRORS:
            problem = Quarantine("bad_href", "no address")
            _add_broken(catalogue, file.address, file.collection, problem)
            continue
        if not inside:
            problem = Quarantine("host_refused", "it is not of this catalogue's own server")
        elif file.depth >= MAX_DEPTH:
            problem = Quarantine("too_deep", f"it is {MAX_DEPTH + 1} links below the root")
        else:
            yield LinkedFile(address, file.collection, file.depth + 1)
            continue
        _add_broken(catalogue, address, file.collection, problem)


def resolve_href(base: str, href: str) -> str:
    """Resolve an href relative to the file in which it is written."""
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


def lies_within(root: str, address: str) -> bool:
    """Check whether an address lies on the catalogue's own server, bucket or folder."""
    if is_local(root):
        return address.startswith(folder_of(root) + "/")
    if scheme_of(root) == "s3":
        return address.startswith(root[: root.index("/", 5) + 1])
    return scheme_of(address) in ("http", "https") and same_server(root, address)


def _add_broken(
    catalogue: StaticCatalog, address: str, collection: str, problem: Quarantine
) -> None:
    """Add a row for a link that can't be followed, with its address relative to the root."""
    base = catalogue.root.rpartition("/")[0] + "/"
    relative = without_secrets(address.removeprefix(base))
    item = broken_link_item(relative, collection, problem)
    log.warning("search: %s", item.problem.detail if item.problem else "")
    catalogue.broken.append(item)


def select_items(catalogue: StaticCatalog, query: Query, max_items: int) -> list[CanonicalItem]:
    """Return the items that match a query, and the rows of broken links.

    Args:
        catalogue: The catalogue, read.
        query: The search, with its collections.
        max_items: Largest number of matching items.

    Raises:
        UsageError: More items match.
    """
    base = folder_of(catalogue.root) if is_local(catalogue.root) else ""
    others = set(catalogue.collections) - set(query.collections)
    items = [
        canonicalize(item, base, SCHEME)
        for item in catalogue.items
        if matches(item, query)
        and not (isinstance(item, dict) and str(item.get("collection")) in others)
    ]
    if len(items) > max_items:
        raise UsageError(
            f"more than search.max_items = {max_items} items match; raise it, or narrow "
            "search.bbox, search.datetime or search.collections"
        )
    return [*items, *catalogue.broken]
