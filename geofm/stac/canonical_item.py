"""An item as it is kept: the one text that all servers' renderings of it come to.

A database may write 1 for 1.0 or leave out a null, a server adds links and the address it has
today, an asset's href a credential of the hour. None of that is the item, so none of it is kept.
What is kept is hashed: two items differ exactly when their ``sha256`` does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from data_catalog.hashing import canonical
from data_catalog.redaction import without_secrets, without_secrets_in
from geofm.remote.quarantine import Quarantine
from geofm.runtime.text import instant
from geofm.stac.item import MAX_ID_LENGTH
from geofm.types import Json

log = logging.getLogger("geofm.search")

#: Frozen items above this size (bytes) are refused: a row of metadata is not a place for data.
MAX_ITEM_BYTES = 256 * 1024
#: Whole numbers below this are kept digit by digit; databases hold larger ones as floats.
EXACT = 2**64
#: Properties that STAC defines as times.
TIMES = (
    "datetime", "start_datetime", "end_datetime", "created", "updated", "published", "expires",
    "unpublished",
)  # fmt: skip
#: A time with a zone and no more digits than Python keeps.
_FULL_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?(Z|z|[+-]\d\d:\d\d)")


@dataclass(frozen=True)
class Frozen:
    """One item of a listing.

    Attributes:
        item_id: its id, empty where that is no text.
        collection: the collection it names, empty likewise.
        text: canonical JSON of what lasts of it, or of its id and collection where there is a
            problem.
        sha256: of all that lasts of it.
        problem: why it can't be frozen.
    """

    item_id: str
    collection: str
    text: str
    sha256: str
    problem: Quarantine | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What names an item in a catalogue."""
        return self.collection, self.item_id


def frozen_item(item: Any, base: str = "", scheme: str = "planet") -> Frozen:
    """An item as it was listed, frozen; never fails.

    Args:
        item: JSON, perhaps not even an object.
        base: address of the catalogue itself, of which hrefs below it are kept relative.
        scheme: what stands for ``base`` in them.
    """
    problem: Quarantine | None = None
    if not isinstance(item, dict):
        item, text = {"": item}, "{}"
        problem = Quarantine("wrong_types", "the item is no JSON object")
    else:
        try:
            text = freeze(item, base, scheme)
        except Quarantine as error:
            text, problem = stub(item), error
    whole = text
    if problem is not None:
        try:
            whole = json.dumps(lasting(item, base, scheme), sort_keys=True)
        except RecursionError:
            log.info("search: an item is nested too deeply; it is told apart by its id alone")
    digest = hashlib.sha256(whole.encode("utf-8", errors="surrogatepass")).hexdigest()
    name, collection = plain(item.get("id")), plain(item.get("collection"))
    return Frozen(name, collection, text, digest, problem)


def broken_link(address: str, collection: str, problem: Quarantine) -> Frozen:
    """What stands for an item, or a whole branch, that a static catalogue links to in vain."""
    detail = f"{address!a:.120} leads to nothing that can be read: {problem.detail}"
    digest = hashlib.sha256(address.encode("utf-8", errors="surrogatepass")).hexdigest()
    return Frozen("", plain(collection), "{}", digest, Quarantine("broken_link", detail))


def plain(value: Any) -> str:
    """A text that Parquet can hold; nothing else is turned into one."""
    if not isinstance(value, str):
        return ""
    return without_secrets(value).encode("utf-8", errors="replace").decode("utf-8")


def freeze(item: Json, base: str = "", scheme: str = "planet") -> str:
    """What lasts of an item, as canonical JSON text.

    Raises:
        Quarantine: ``not_json`` for NaN and infinities, ``item_too_large``.
    """
    try:
        text = canonical(lasting(item, base, scheme)).decode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise Quarantine("not_json", f"the item is no valid JSON: {error}") from error
    if len(text.encode("utf-8")) > MAX_ITEM_BYTES:
        raise Quarantine("item_too_large", f"the item has more than {MAX_ITEM_BYTES} bytes of JSON")
    return text


def lasting(item: Json, base: str = "", scheme: str = "planet") -> Json:
    """What of an item stays the same: no links, no credentials, one way to write each value."""
    kept = {key: value for key, value in item.items() if key != "links"}
    frozen: Json = normal(without_secrets_in(kept))
    assets, properties = frozen.get("assets"), frozen.get("properties")
    if isinstance(assets, dict):
        frozen["assets"] = {
            key: {**asset, "href": _freeze_href(asset["href"], base, scheme)}
            if isinstance(asset, dict) and isinstance(asset.get("href"), str)
            else asset
            for key, asset in assets.items()
        }
    if isinstance(properties, dict):
        times = {name: _time(properties[name]) for name in TIMES if name in properties}
        frozen["properties"] = {**properties, **times}
    return frozen


def normal(value: Any) -> Any:
    """JSON in one of the ways that mean the same: no null members, 1 for 1.0.

    Members that are null are dropped because a database (pgstac) does so before we could see them,
    and because nothing here tells null from absent. Nulls in lists stay: they count.
    """
    if isinstance(value, dict):
        return {name: normal(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [normal(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) >= EXACT:
        try:
            return float(value)
        except OverflowError:
            return value
    return value


def _time(value: Any) -> Any:
    """A time in UTC with the digits it needs; what is not plainly a time stays as it is."""
    if not (isinstance(value, str) and _FULL_TIME.fullmatch(value)):
        return value
    when = instant(value.upper())
    try:
        return value if when is None else stamp(when.astimezone(UTC).isoformat())
    except OverflowError:  # a zone that leads out of the calendar
        return value


def stamp(text: str) -> str:
    """UTC as RFC 3339 writes it, without zeros at the end of the seconds."""
    whole, dot, fraction = text.removesuffix("+00:00").partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}{dot if fraction else ''}{fraction}Z"


def _freeze_href(href: str, base: str, scheme: str) -> str:
    """One address as it is stored."""
    base = base.rstrip("/")
    if base and href.startswith(base + "/"):
        return f"{scheme}:" + href.removeprefix(base)
    return href


def stub(item: Json) -> str:
    """What is kept of an item that can't be frozen: its id and collection, cut to length."""
    names = [key for key in ("id", "collection") if isinstance(item.get(key), str)]
    texts = {key: without_secrets(item[key]) for key in names}
    cut = {key: text[:MAX_ID_LENGTH].encode("ascii", "replace") for key, text in texts.items()}
    return canonical({key: text.decode("ascii") for key, text in cut.items()}).decode("utf-8")
