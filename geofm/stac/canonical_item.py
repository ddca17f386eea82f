"""The canonical form of an item: one text, whatever server or file it comes from.

Servers write the same item in different ways: 1 or 1.0, a null or no member, links and addresses of
today, signed hrefs. The canonical form leaves out links, credentials and nulls, and writes each
number and time in one way. Items differ if and only if the SHA-256 of this text differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from data_catalog.hashing import canonical
from data_catalog.redaction import without_secrets, without_secrets_in
from geofm.remote.quarantine import Quarantine
from geofm.runtime.timestamps import format_utc, parse_time
from geofm.stac.item import MAX_ID_LENGTH
from geofm.types import Json

log = logging.getLogger("geofm.search")

#: Largest canonical text (bytes); data belongs into assets, not into items.
MAX_ITEM_BYTES = 256 * 1024
#: Integers below this keep all digits; databases store larger integers as floats.
MAX_INTEGER = 2**64
#: Properties that STAC defines as times.
TIMES = (
    "datetime",
    "start_datetime",
    "end_datetime",
    "created",
    "updated",
    "published",
    "expires",
    "unpublished",
)
#: A time with a zone and at most the six digits that Python keeps.
_FULL_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|z|[+-]\d\d:\d\d)")


@dataclass(frozen=True)
class CanonicalItem:
    """An item of a listing in canonical form.

    Attributes:
        item_id: The item's id; empty if it is no text.
        collection: The item's collection; empty if it is no text.
        text: Canonical JSON; if there is a problem, canonical JSON of id and collection only.
        sha256: SHA-256 of the whole canonical form, also if ``text`` is shortened.
        problem: Reason why the item has no canonical form.
    """

    item_id: str
    collection: str
    text: str
    sha256: str
    problem: Quarantine | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Collection and id, which name an item in a catalogue."""
        return self.collection, self.item_id


def canonicalize(item: Any, base: str = "", scheme: str = "planet") -> CanonicalItem:
    """Bring a listed item into canonical form; never fails.

    Args:
        item: Parsed JSON of any type.
        base: Address of the catalogue. Hrefs below it are stored relative to it.
        scheme: Scheme that replaces ``base`` in these hrefs.
    """
    problem: Quarantine | None = None
    if not isinstance(item, dict):
        item, text = {"": item}, "{}"
        problem = Quarantine("wrong_types", "the item is no JSON object")
    else:
        try:
            text = canonical_text(item, base, scheme)
        except Quarantine as error:
            text, problem = _short_text(item), error
    hashed = text
    if problem is not None:
        try:
            hashed = json.dumps(_stable_fields(item, base, scheme), sort_keys=True)
        except RecursionError:
            log.info("search: an item is nested too deeply; only its id and collection are hashed")
    digest = hashlib.sha256(hashed.encode("utf-8", errors="surrogatepass")).hexdigest()
    name, collection = storable_text(item.get("id")), storable_text(item.get("collection"))
    return CanonicalItem(name, collection, text, digest, problem)


def broken_link_item(address: str, collection: str, problem: Quarantine) -> CanonicalItem:
    """Make the quarantined item for a link of a static catalogue that can't be followed."""
    detail = f"{address!a:.120} leads to nothing that can be read: {problem.detail}"
    digest = hashlib.sha256(address.encode("utf-8", errors="surrogatepass")).hexdigest()
    reason = Quarantine("broken_link", detail)
    return CanonicalItem("", storable_text(collection), "{}", digest, reason)


def storable_text(value: Any) -> str:
    """Return a text without secrets that Parquet can store; empty for any other value."""
    if not isinstance(value, str):
        return ""
    return without_secrets(value).encode("utf-8", errors="replace").decode("utf-8")


def canonical_text(item: Json, base: str = "", scheme: str = "planet") -> str:
    """Write the canonical form of an item as JSON; arguments as for `canonicalize`.

    Raises:
        Quarantine: ``not_json`` for NaN and infinities, ``item_too_large``.
    """
    try:
        text = canonical(_stable_fields(item, base, scheme)).decode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise Quarantine("not_json", f"the item is no valid JSON: {error}") from error
    if len(text.encode("utf-8")) > MAX_ITEM_BYTES:
        raise Quarantine("item_too_large", f"the item has more than {MAX_ITEM_BYTES} bytes of JSON")
    return text


def _stable_fields(item: Json, base: str = "", scheme: str = "planet") -> Json:
    """Drop links and secrets, and write numbers, times and hrefs in one way."""
    kept = {key: value for key, value in item.items() if key != "links"}
    stable: Json = normalize_json(without_secrets_in(kept))
    assets, properties = stable.get("assets"), stable.get("properties")
    if isinstance(assets, dict):
        stable["assets"] = {
            key: {**asset, "href": _relative_href(asset["href"], base, scheme)}
            if isinstance(asset, dict) and isinstance(asset.get("href"), str)
            else asset
            for key, asset in assets.items()
        }
    if isinstance(properties, dict):
        times = {name: _normalize_time(properties[name]) for name in TIMES if name in properties}
        stable["properties"] = {**properties, **times}
    return stable


def normalize_json(value: Any) -> Any:
    """Rewrite JSON so that equal meanings have equal texts: no null members, 1 for 1.0.

    Null members are dropped because a database (pgstac) drops them as well, and no check of geofm
    distinguishes null from absent. Nulls in lists stay, because they take a position.
    """
    if isinstance(value, dict):
        return {name: normalize_json(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [normalize_json(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_INTEGER:
        return int(value)
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        try:
            return float(value)
        except OverflowError:
            return value
    return value


def _normalize_time(value: Any) -> Any:
    """Write a full time as UTC; any other value stays as it is."""
    if not (isinstance(value, str) and _FULL_TIME.fullmatch(value)):
        return value
    when = parse_time(value.upper())
    try:
        return value if when is None else format_utc(when)
    except OverflowError:  # in UTC the time lies outside the years that Python knows
        return value


def _relative_href(href: str, base: str, scheme: str) -> str:
    """Replace the catalogue's own address at the start of an href by its scheme."""
    base = base.rstrip("/")
    if base and href.startswith(base + "/"):
        return f"{scheme}:" + href.removeprefix(base)
    return href


def _short_text(item: Json) -> str:
    """Write only id and collection, cut to length, for an item without a canonical form."""
    names = [key for key in ("id", "collection") if isinstance(item.get(key), str)]
    texts = {key: without_secrets(item[key]) for key in names}
    cut = {key: text[:MAX_ID_LENGTH].encode("ascii", "replace") for key, text in texts.items()}
    return canonical({key: text.decode("ascii") for key, text in cut.items()}).decode("utf-8")
