from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pyproj import Geod
from shapely.geometry import Point, box, mapping

from geofm.config.area import MAX_POINTS, circle, split_at_antimeridian
from geofm.config.recipe import SearchSettings
from geofm.config.recipe_book import BadRecipe, load_recipe


def area(**settings: Any) -> Any:
    return SearchSettings.model_validate(settings).geometry()


def test_everywhere_is_none() -> None:
    assert area() is None


def test_a_box_is_itself_and_is_split_at_the_antimeridian() -> None:
    assert area(bbox=(1, 2, 3, 4)).equals(box(1, 2, 3, 4))
    fiji = area(bbox=(177, -20, -178, -15))
    assert fiji.area == pytest.approx(25)
    assert fiji.bounds == (-180, -20, 180, -15)
    assert fiji.contains(Point(179, -17)) and fiji.contains(Point(-179, -17))
    assert not fiji.intersects(Point(0, -17))


@pytest.mark.parametrize("west", [-190.0, 170.0])
def test_longitudes_beyond_the_edge_come_back(west: float) -> None:
    pieces = split_at_antimeridian(box(west, 0, west + 20, 10))
    assert pieces.equals(box(170, 0, 180, 10).union(box(-180, 0, -170, 10)))


def test_a_file_is_read_when_the_recipe_is(tmp_path: Path) -> None:
    file = tmp_path / "areas.geojson"
    features = [{"type": "Feature", "geometry": mapping(box(n, 0, n + 1, 1))} for n in (0, 1)]
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    search = load_recipe("demo", [f"search.area={file}", "search.bbox="]).search
    file.unlink()
    assert search.area is not None and search.area["type"] == "Polygon"
    again = SearchSettings.model_validate(search.model_dump(mode="json"))
    assert again.geometry().equals(box(0, 0, 2, 1))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.geojson", "cannot read nowhere.geojson"),
        ({"type": "Point", "coordinates": [1, 2]}, "must be a Polygon"),
        ({"type": "Polygon", "coordinates": "x"}, "can't be read"),
        ({"type": "FeatureCollection", "features": [7]}, "can't be read"),
        ({"type": "FeatureCollection"}, "no geometry"),
        (mapping(box(400_000, 5_000_000, 400_100, 5_000_100)), "in degrees"),
        (mapping(box(-170, 0, 170, 1)), "cut it at the antimeridian"),
        (mapping(Point(0, 0).buffer(1, MAX_POINTS)), "simplify"),
        ([1, 2], "GeoJSON object"),
    ],
)
def test_areas_that_are_none(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchSettings(area=value)


@pytest.mark.parametrize("place", ["2.35/48.85", "x/1/2", "200/0/1", "0/0/0", "0/0/9999", "0/91/1"])
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(BadRecipe, match=r"search\.places: .*2\.35/48\.85/10"):
        load_recipe("demo", [f"search.places={place}"])


def test_only_one_kind_of_area() -> None:
    with pytest.raises(BadRecipe, match=r"search\.bbox and search\.places are both given"):
        load_recipe("demo", ["search.bbox=1,2,3,4", "search.places=1/2/3"])


@pytest.mark.parametrize(
    ("lon", "lat", "radius"),
    [(2.35, 48.85, 10), (180, 0, 500), (-179.9, 65, 300), (10, 89, 300), (10, -90, 1000)],
)
def test_circles_hold_what_is_near(lon: float, lat: float, radius: float) -> None:
    disc = area(places=[f"{lon}/{lat}/{radius}"])
    assert disc.is_valid
    west, south, east, north = disc.bounds
    assert -180 <= west < east <= 180 and -90 <= south < north <= 90
    for share, inside in ((0.98, True), (1.02, False)):
        for turn in range(0, 360, 10):
            there = Geod(ellps="WGS84").fwd(lon, lat, turn, radius * 1000 * share)[:2]
            assert disc.intersects(Point(there)) == inside, (share, turn)
    flat = math.pi * (radius / 111.2) ** 2 / max(math.cos(math.radians(lat)), 0.01)
    assert lat > 85 or lat < -85 or circle(lon, lat, radius).area == pytest.approx(flat, rel=0.05)


def test_places_are_joined() -> None:
    assert area(places=["0/0/10", "5/0/10"]).geom_type == "MultiPolygon"
    assert area(places=["0/0/10", "0.05/0/10"]).geom_type == "Polygon"
