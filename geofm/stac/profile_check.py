"""Check of a source profile against one item, before a search: `geofm sources --check --item`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data_catalog.errors import UsageError
from data_catalog.provenance.licences import item_licence
from data_catalog.sources import Source
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import scheme_of, signing_of
from geofm.stac.bands import Band, described_bands, find_band, find_layer, is_data
from geofm.stac.canonical_item import canonical_text
from geofm.stac.item import check_item
from geofm.stac.supersede import Acquisition, read_acquisition
from geofm.types import Json


def profile_for_item(item: Json, sources: Sequence[Source]) -> Source:
    """Return the first profile that covers the item's collection, for any API.

    Raises:
        UsageError: No profile covers it.
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


def check_profile(item: Any, source: Source) -> Json:
    """Report what a profile finds in an item, and what it lacks, with the remedies.

    Args:
        item: Parsed JSON of a STAC item.
        source: The profile.

    Returns:
        ``bands`` (name, asset, index, scale, offset, nodata, href), ``cloud``, ``licence``,
        ``identity``, ``access``, ``problems`` (they prevent the use of the item) and ``notes``.
    """
    report: Json = {
        "profile": source.name,
        "item": None,
        "collection": None,
        "bands": [],
        "cloud": None,
        "licence": source.licence,
        "identity": {},
        "access": {},
        "problems": [],
        "notes": [],
    }
    if not isinstance(item, dict):
        return {**report, "problems": ["the item is no JSON object: give a STAC item"]}
    report |= {"item": item.get("id"), "collection": item.get("collection")}
    try:
        canonical: Json = json.loads(canonical_text(item))
        area = check_item(canonical, [str(item.get("collection"))])
        acquisition = read_acquisition(canonical, source.identity, area)
    except Quarantine as error:
        return {**report, "problems": [f"the search would refuse the item: {error}"]}
    report["licence"] = item_licence(canonical["properties"].get("license"), None, source.licence)
    _report_bands(canonical, source, report)
    _report_cloud(canonical, source, report)
    _report_identity(acquisition, source, report)
    _report_access(source, report)
    return report


def _report_bands(item: Json, source: Source, report: Json) -> None:
    """Report the bands of the profile, and those that the assets describe."""
    names = [*source.bands, *(name for name in _common_names(item) if name not in source.bands)]
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
        report["bands"].append(_band_fields(band))
        if band.scale is None and band.usual_scale is None:
            report["notes"].append(
                f"bands.{name}: no scale is stated, so 0.0001 is used for 16-bit files; set "
                "default_scale if it is different"
            )
    if not names:
        report["problems"].append(
            "bands: the assets describe no common names (eo:bands or bands); name their assets, "
            f"e.g. bands: {{red: {next(iter(item['assets']))}}}"
        )


def _common_names(item: Json) -> list[str]:
    """Return the common names of the bands that the item's imagery describes, in order."""
    names: dict[str, None] = {}
    for asset in item["assets"].values():
        for band in described_bands(item, asset) if is_data(asset) else []:
            name = band.get("eo:common_name") or band.get("common_name")
            if isinstance(name, str) and name:
                names[name.lower()] = None
    return list(names)


def _band_fields(band: Band) -> Json:
    """Return the fields of a band that the report shows."""
    return {
        "name": band.name,
        "asset": band.asset,
        "index": band.index,
        "scale": band.scale if band.scale is not None else band.usual_scale,
        "offset": band.offset,
        "nodata": band.nodata,
        "href": band.href,
    }


def _report_cloud(item: Json, source: Source, report: Json) -> None:
    """Report the cloud layer of the profile."""
    if source.cloud is None:
        report["notes"].append(
            "cloud: the profile names no layer, so clouds are known by eo:cloud_cover alone"
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


def _report_identity(acquisition: Acquisition, source: Source, report: Json) -> None:
    """Report the properties by which reprocessed items are recognised."""
    names = ("acquisition", "tile", "version", "generated", "sequence", "product")
    report["identity"] = {name: getattr(acquisition, name) for name in names}
    for name, properties in (
        ("acquisition", source.identity.acquisition),
        ("tile", source.identity.tile),
    ):
        if not report["identity"][name]:
            cause = (
                f"the item lacks {', '.join(properties)}"
                if properties
                else "the profile names no property"
            )
            report["notes"].append(
                f"identity.{name}: {cause}, so a reprocessed item is not recognised as the same "
                "acquisition; name properties that identify it"
            )


def _report_access(source: Source, report: Json) -> None:
    """Report how the assets are read."""
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
