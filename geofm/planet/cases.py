"""The planted cases of a plan: pairs and scenes that curation should recognise."""

from __future__ import annotations

from itertools import combinations

import shapely
from shapely.geometry import box

from geofm.planet.catalog.stac_items import item_id, to_degrees
from geofm.planet.scenes import Plan, Product, Tile
from geofm.types import Json


def planted_cases(plan: Plan) -> list[Json]:
    """List the cases of a plan, each with its ``kind`` and its items.

    ``reprocessed`` and ``second_station`` name the item to ``keep``. ``tile_overlap`` has the
    ground that both items show (``overlap``, degrees) and states whether they have the same CRS.
    """
    tiles = {tile.name: tile for tile in plan.tiles}
    takes = {take.name: take for take in plan.takes}

    def name(product: Product) -> str:
        return item_id(tiles[product.tile], product, takes[product.take])

    cases: list[Json] = []
    for a, b in combinations(plan.products, 2):
        if (a.tile, a.take) == (b.tile, b.take):
            kind = "second_station" if a.baseline == b.baseline else "reprocessed"
            newer = max(a, b, key=lambda p: (p.baseline, p.made))
            cases.append(
                {"kind": kind, "items": [name(a), name(b)], "keep": name(newer),
                 "baselines": [a.baseline, b.baseline]}
            )  # fmt: skip
        elif a.take == b.take:
            overlap = _overlap(tiles[a.tile], tiles[b.tile])
            if overlap is not None:
                same = tiles[a.tile].epsg == tiles[b.tile].epsg
                cases.append(
                    {"kind": "tile_overlap", "items": [name(a), name(b)], "same_crs": same,
                     "overlap": shapely.geometry.mapping(overlap)}
                )  # fmt: skip
        elif a.tile == b.tile and a.sequence == b.sequence == 0:
            cases.append({"kind": "temporal_pair", "items": [name(a), name(b)]})
    for product in plan.products:
        if product.swath is not None:
            cases.append(
                {"kind": "nodata_border", "items": [name(product)], "swath": product.swath}
            )
        if takes[product.take].clouds > 0.3:
            cases.append({"kind": "cloud_deck", "items": [name(product)]})
        if tiles[product.tile].about in ("dunes", "open sea with a strip of coast"):
            cases.append({"kind": "monotone", "items": [name(product)]})
    return [{"id": f"case-{number:03d}", **case} for number, case in enumerate(cases)]


def _overlap(a: Tile, b: Tile) -> shapely.Polygon | None:
    """Return the ground that two tiles share, in degrees; None if they share none."""
    shared = to_degrees(box(*a.extent), a.epsg).intersection(to_degrees(box(*b.extent), b.epsg))
    return None if shared.is_empty or shared.area == 0 else shared
