from __future__ import annotations

import json
from typing import Any

import pytest

from data_catalog.redaction import without_secrets
from data_catalog.sources import source_for
from geofm.remote.quarantine import Quarantine
from geofm.stac.bands import find_band
from geofm.stac.canonical_item import canonical_text
from geofm.stac.item import check_item

RING = [[[2, 48], [3, 48], [3, 49], [2, 49], [2, 48]]]


def an_item(**change: Any) -> dict[str, Any]:
    item: dict[str, Any] = {
        "id": "a", "collection": "c", "geometry": {"type": "Polygon", "coordinates": RING},
        "properties": {"datetime": "2020-01-01T00:00:00Z"},
        "assets": {"red": {"href": "https://example.com/red.tif"}},
        "links": [{"rel": "self", "href": "x"}],
    }  # fmt: skip
    return {**item, **change}


def reason(item: dict[str, Any]) -> str:
    with pytest.raises(Quarantine) as caught:
        check_item(item, ["c"])
    return caught.value.reason


def test_a_good_item_passes_and_gives_its_area() -> None:
    assert check_item(an_item(), ["c"]).area == 1


@pytest.mark.parametrize(
    "name", ["", "  ", "../x", "/etc/x", "a\\b", "a..b", "a\nb", "a\u202eb", "A" * 400, None, 7]
)
def test_ids_that_are_no_names(name: object) -> None:
    assert reason(an_item(id=name)) == "bad_id"


@pytest.mark.parametrize(
    "href",
    ["file:///etc/passwd", "/etc/passwd", "/vsizip//etc/passwd", "red.tif", "planet:/x", "data:,x"],
)
def test_addresses_inside_this_machine(href: str) -> None:
    assert reason(an_item(assets={"red": {"href": href}})) == "bad_scheme"


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"datetime": None}, "no_datetime"),
        ({"datetime": None, "start_datetime": "2020-01-01T00:00:00Z"}, "no_datetime"),
        ({"datetime": "yesterday"}, "bad_datetime"),
        ({"eo:cloud_cover": "NaN"}, "wrong_types"),
        ({"eo:cloud_cover": 101}, "wrong_types"),
        ({"proj:epsg": "EPSG:minus one"}, "wrong_types"),
        ({"proj:code": "nonsense"}, "wrong_types"),
        ({"proj:shape": [1, -1]}, "wrong_types"),
        ({"proj:transform": [1, 2]}, "wrong_types"),
    ],
)
def test_properties_of_the_wrong_kind(properties: dict[str, Any], expected: str) -> None:
    full = {"datetime": "2020-01-01T00:00:00Z", **properties}
    assert reason(an_item(properties=full)) == expected


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        (None, "bad_geometry"),
        ({"type": "Point", "coordinates": [1, 2]}, "bad_geometry"),
        ({"type": "Polygon", "coordinates": "x"}, "bad_geometry"),
        ({"type": "Nonsense"}, "bad_geometry"),
        ({"type": "Polygon", "coordinates": [[[1, 1]] * 4]}, "no_area"),
        ({"type": "Polygon", "coordinates": [[[500, 0], [501, 0], [501, 1], [500, 0]]]},
         "bad_geometry"),
    ],
)  # fmt: skip
def test_geometries_without_ground(geometry: object, expected: str) -> None:
    assert reason(an_item(geometry=geometry)) == expected


def test_the_canonical_form_has_no_links_and_no_credentials() -> None:
    item = an_item(assets={
        "a": {"href": "https://u:p@h/x.tif?se=1&sig=2&sv=3&keep=4"},
        "b": {"href": "http://127.0.0.1:5/assets/x.tif"},
    })  # fmt: skip
    canonical = json.loads(canonical_text(item, "http://127.0.0.1:5"))
    assert "links" not in canonical
    assert canonical["assets"]["a"]["href"] == "https://h/x.tif?keep=4"
    assert canonical["assets"]["b"]["href"] == "planet:/assets/x.tif"
    assert without_secrets("https://h/x?X-Amz-Signature=1&X-Amz-Date=2") == "https://h/x"


def test_items_without_a_canonical_form() -> None:
    with pytest.raises(Quarantine, match="not_json"):
        canonical_text(an_item(extra=float("nan")))
    with pytest.raises(Quarantine, match="item_too_large"):
        canonical_text(an_item(extra="x" * 300_000))


S2 = source_for("http://x", "sentinel-2-x")


@pytest.mark.parametrize(
    ("item_bands", "asset"),
    [
        (None, {"eo:bands": [{"name": "B04", "common_name": "red"}],
                "raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}]}),
        (None, {"bands": [{"name": "B04", "eo:common_name": "red", "raster:scale": 0.0001,
                           "raster:offset": -0.1, "nodata": 0}]}),
        (None, {"bands": [{"name": "red"}], "raster:scale": 0.0001, "raster:offset": -0.1}),
        ([{"name": "B03", "common_name": "green"}, {"name": "B04", "common_name": "red"}],
         {"eo:bands": [1], "raster:bands": [{"scale": 0.0001, "offset": -0.1}]}),
    ],
    ids=["1.0", "1.1", "1.1 asset", "0.9"],
)  # fmt: skip
def test_bands_of_old_and_new_items(item_bands: Any, asset: dict[str, Any]) -> None:
    properties = {"eo:bands": item_bands} if item_bands else {}
    item = {"properties": properties, "assets": {"B04": {"href": "https://h/B04.tif", **asset}}}
    band = find_band(item, "red", S2)
    assert (band.asset, band.index, band.scale, band.offset) == ("B04", 1, 0.0001, -0.1)
    assert band.nodata == 0


def test_one_asset_with_four_bands() -> None:
    names = [{"name": n, "common_name": n} for n in ("red", "green", "blue", "nir")]
    image = {"href": "https://h/i.tif", "eo:bands": names}
    visual = {**image, "roles": ["visual"]}
    item = {"properties": {}, "assets": {"a": visual, "image": image}}
    assert [find_band(item, n, S2).index for n in ("red", "nir")] == [1, 4]
    assert find_band(item, "nir", S2).asset == "image"


def test_an_offset_that_is_in_the_pixels_is_not_applied_again() -> None:
    asset = {"href": "https://h/r.tif", "raster:bands": [{"scale": 0.0001, "offset": -0.1}]}
    item = {"properties": {"earthsearch:boa_offset_applied": True}, "assets": {"red": asset}}
    assert find_band(item, "red", S2).offset == 0


def test_planetary_computer_states_no_offset_but_has_one() -> None:
    source = source_for("https://planetarycomputer.microsoft.com/api/stac/v1", "sentinel-2-l2a")
    assets = {"B04": {"href": "https://h/B04.tif"}}
    new = {"properties": {"s2:processing_baseline": "04.00"}, "assets": assets}
    old = {"properties": {"s2:processing_baseline": "03.01"}, "assets": assets}
    assert find_band(new, "red", source).offset == pytest.approx(-0.1)
    assert find_band(old, "red", source).offset == 0


def test_missing_and_unfit_bands() -> None:
    item = {"properties": {}, "assets": {"red": {"href": "https://h/r", "type": "application/xml"}}}
    with pytest.raises(Quarantine, match="not_imagery"):
        find_band(item, "red", S2)
    with pytest.raises(Quarantine, match="missing_band"):
        find_band(item, "nir", S2)
