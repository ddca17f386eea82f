"""What a source profile makes of one item, before anything is searched or read with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data_catalog.errors import UsageError
from data_catalog.sources import Source, spdx_licence
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import scheme_of, signing_of
from geofm.stac.bands import Band, described, find_band, find_layer, is_data
from geofm.stac.canonical_item import freeze
from geofm.stac.item import check_item
from geofm.stac.supersede import Scene, scene_of
from geofm.types import Json


def profile_of(item: Json, sources: Sequence[Source]) -> Source:
    """The first profile that is meant for the item's collection, whatever its API.

    Raises:
        UsageError: none is.
    """
    collection = item.get("collection")
    for source in sources:
        if source.covers_collection(str(collection)):
            return source
    names = ", ".join(f"{s.name} (collections {', '.join(s.collections)})" for s in sources)
    raise UsageError(
        f"the item's collection {collection!r} is covered by no profile of the file: {names}; add "
        "it to `collections`"
    )


def examine(item: Any, source: Source) -> Json:
    """What the profile finds in an item, and what it does not find with the remedy.

    Args:
        item: parsed JSON of a STAC item.
        source: the profile.

    Returns:
        ``bands`` (name, asset, index, scale, offset, nodata, href), ``cloud``, ``licence``,
        ``identity``, ``access``, ``problems`` (the item can't be used as it should) and ``notes``.
    """
    report: Json = {"profile": source.name, "item": None, "collection": None, "bands": [],
                    "cloud": None, "licence": source.licence, "identity": {}, "access": {},
                    "problems": [], "notes": []}  # fmt: skip
    if not isinstance(item, dict):
        return {**report, "problems": ["the item is no JSON object: give a STAC item"]}
    report |= {"item": item.get("id"), "collection": item.get("collection")}
    try:
        frozen: Json = json.loads(freeze(item))
        area = check_item(frozen, [str(item.get("collection"))])
        scene = scene_of(frozen, source.identity, area)
    except Quarantine as error:
        return {**report, "problems": [f"the search would refuse the item: {error}"]}
    report["licence"] = spdx_licence(frozen["properties"].get("license")) or source.licence
    _look_for_bands(frozen, source, report)
    _look_for_cloud(frozen, source, report)
    _look_at_identity(scene, source, report)
    _look_at_access(source, report)
    return report


def _look_for_bands(item: Json, source: Source, report: Json) -> None:
    """All bands that the profile names, and those that the assets describe."""
    names = [*source.bands, *(name for name in common_names(item) if name not in source.bands)]
    for name in names:
        try:
            band = find_band(item, name, source)
        except Quarantine as error:
            known = source.bands[name].asset if name in source.bands else ""
            report["problems"].append(
                f"bands.{name}: {error.detail.partition(';')[0]}"
                + (f" (the profile says asset {known!r})" if known else "")
                + f"; the item's assets are {', '.join(item['assets'])}"
            )
            continue
        report["bands"].append(_band(band))
        if band.scale is None and band.usual_scale is None:
            report["notes"].append(
                f"bands.{name}: no scale is stated, so 0.0001 is taken for files of 16 bits; give "
                "default_scale if it is another"
            )
    if not names:
        report["problems"].append(
            "bands: the assets describe no common names (eo:bands or bands); say where they lie, "
            f"e.g. bands: {{red: {next(iter(item['assets']))}}}"
        )


def common_names(item: Json) -> list[str]:
    """Common names of bands that the item's imagery describes, as they come."""
    found: dict[str, None] = {}
    for asset in item["assets"].values():
        for band in described(item, asset) if is_data(asset) else []:
            name = band.get("eo:common_name") or band.get("common_name")
            if isinstance(name, str) and name:
                found[name.lower()] = None
    return list(found)


def _band(band: Band) -> Json:
    scale = band.scale if band.scale is not None else band.usual_scale
    return {"name": band.name, "asset": band.asset, "index": band.index, "scale": scale,
            "offset": band.offset, "nodata": band.nodata, "href": band.href}  # fmt: skip


def _look_for_cloud(item: Json, source: Source, report: Json) -> None:
    if source.cloud is None:
        report["notes"].append(
            "cloud: the profile names no layer, so clouds are told by eo:cloud_cover alone"
        )
        return
    layer = find_layer(item, source.cloud.asset)
    if layer is None:
        report["problems"].append(
            f"cloud.asset: the item has no asset {source.cloud.asset!r}; it has "
            f"{', '.join(item['assets'])}"
        )
        return
    report["cloud"] = {"href": layer.href, **source.cloud.model_dump(mode="json")}


def _look_at_identity(scene: Scene, source: Source, report: Json) -> None:
    names = ("acquisition", "tile", "version", "generated", "sequence", "product")
    report["identity"] = {name: getattr(scene, name) for name in names}
    for name, properties in (
        ("acquisition", source.identity.acquisition),
        ("tile", source.identity.tile),
    ):
        if not report["identity"][name]:
            asked = f"the item lacks {', '.join(properties)}" if properties else "nothing is named"
            report["notes"].append(
                f"identity.{name}: {asked}, so a reprocessed item is not recognised as the same "
                "acquisition; name properties that tell it"
            )


def _look_at_access(source: Source, report: Json) -> None:
    signing = signing_of(source)
    schemes = sorted({scheme_of(band["href"]) for band in report["bands"]})
    when = "before every read" if signing.always else "when refused"
    report["access"] = {
        "schemes": schemes,
        "signing": when if signing.url else "never",
        "requester_pays": signing.requester_pays,
        "credentials_for": list(signing.credentials_for),
        "endpoint": signing.endpoint,
        "region": signing.region,
    }
    if signing.requester_pays and "s3" in schemes:
        report["notes"].append("requester_pays: AWS credentials are needed, and reading costs")
