"""Build a world: render every scene, and write COGs, items, collections and the truth file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.progress import tick
from data_catalog.storage.atomic import atomic_folder
from geofm.planet import sensors
from geofm.planet.cases import planted_cases
from geofm.planet.catalog import stac_items
from geofm.planet.catalog.cog import cog_bytes, png_bytes
from geofm.planet.catalog.site import Planet, make_planet
from geofm.planet.scenery.landcover import CLASSES
from geofm.planet.scenes import VERSION, Plan, Product, Take, Tile, default_plan
from geofm.raster.radiometry import WHITE
from geofm.types import Floats32, Json


def build_world(root: Path, seed: int = 7, plan: Plan | None = None) -> Path:
    """Build a world if it does not exist yet, and return its folder.

    Args:
        root: Folder of the worlds.
        seed: Seed of everything random.
        plan: The scenes; by default those of the default world.
    """
    chosen = plan or default_plan()
    target = root / f"world-{VERSION}-{seed}-{chosen.digest[:8]}"
    return build_folder(target, partial(_write_world, seed=seed, plan=chosen))


def build_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder whose name determines its bytes, unless it exists.

    It is written under a temporary name and then renamed, so a folder that exists is complete.
    """
    if target.is_dir():
        return target
    with atomic_folder(target, Path.is_dir) as folder:
        write(folder)
    return target


def _write_world(folder: Path, seed: int, plan: Plan) -> None:
    """Render all scenes and write the world's files."""
    total = len(plan.products) + len(plan.flights) + 1
    tick("planet", 0, total, "relief, rivers and towns")
    planet = make_planet(seed)
    work = [(tile, plan.products) for tile in plan.tiles]
    work += [(tile, plan.flights) for tile in plan.aerial]
    takes = {take.name: take for take in plan.takes}
    items: list[Json] = []
    # Threads help: numpy and GDAL release the interpreter lock most of the time.
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 3))) as pool:
        jobs = [
            pool.submit(_render_tile, folder, planet, tile, _products_of(tile, products), takes)
            for tile, products in work
        ]
        for job, (tile, _) in zip(jobs, work, strict=True):
            items += job.result()
            tick("planet", len(items) + 1, total, tile.about)
    items.sort(key=lambda item: item["id"])
    for name in (stac_items.SATELLITE, stac_items.AERIAL):
        members = [item for item in items if item["collection"] == name]
        if members:
            _write_json(
                folder / "collections" / f"{name}.json", stac_items.collection_of(name, members)
            )
    for item in items:
        _write_json(folder / "items" / item["collection"] / f"{item['id']}.json", item)
    _write_json(
        folder / "truth.json",
        {
            "version": VERSION, "seed": seed, "plan": plan.digest, "classes": list(CLASSES),
            "tiles": {tile.name: _tile_facts(tile) for tile in (*plan.tiles, *plan.aerial)},
            "cases": planted_cases(plan),
        },
    )  # fmt: skip


def _products_of(tile: Tile, products: Sequence[Product]) -> list[Product]:
    """Return the products of a tile."""
    return [product for product in products if product.tile == tile.name]


def _tile_facts(tile: Tile) -> Json:
    """Return the entry of a tile in the truth file."""
    return {
        "epsg": tile.epsg, "extent": list(tile.extent), "gsd": tile.gsd, "about": tile.about,
        "classes": f"truth/{tile.name}.tif",
    }  # fmt: skip


def _write_json(path: Path, value: Json) -> None:
    """Write a JSON file with sorted keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=float)
    path.write_text(text + "\n", encoding="utf-8")


def _render_tile(
    folder: Path, planet: Planet, tile: Tile, products: list[Product], takes: dict[str, Take]
) -> list[Json]:
    """Render all products of a tile; the ground is surveyed once, each overpass rendered once."""
    view = sensors.look_at(planet, tile)
    truth = cog_bytes(view.label, tile.epsg, tile.west, tile.north, tile.gsd, classes=True)
    _write_file(folder, f"truth/{tile.name}.tif", truth)
    shots: dict[str, sensors.Shot] = {}
    items = []
    for product in sorted(products, key=lambda p: p.take):
        if product.take not in shots:
            shots = {product.take: sensors.shoot(planet, view, takes[product.take])}
        shot, take = shots[product.take], takes[product.take]
        render = _render_satellite if tile.gsd > 5 else _render_aerial
        items.append(render(folder, view, product, take, shot))
    return items


def _write_file(folder: Path, href: str, data: bytes) -> None:
    """Write a file at its relative address."""
    path = folder / href
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _render_satellite(
    folder: Path, view: sensors.View, product: Product, take: Take, shot: sensors.Shot
) -> Json:
    """Write the files of a satellite product and return its item."""
    tile = view.tile
    name = stac_items.item_id(tile, product, take)
    bands: dict[str, NDArray[Any]] = {**sensors.satellite_bands(shot, product.baseline)}
    classes = sensors.scene_classes(shot, view)
    picture = shot.values[[2, 1, 0]] / WHITE
    if product.swath is not None:
        gap = sensors.swath_gap(tile, product.swath)
        for image in bands.values():
            cell = tile.size // image.shape[0]
            image[gap[::cell, ::cell]] = 0
        classes[gap[::2, ::2]] = 0
        picture[:, gap] = 0
    offset = -sensors.ADDED * sensors.SCALE if product.baseline >= "04.00" else 0.0
    assets: Json = {}
    bands["scl"] = classes
    for band, image in bands.items():
        cell = tile.size // image.shape[0]
        data = cog_bytes(
            image, tile.epsg, tile.west, tile.north, tile.gsd * cell,
            classes=band == "scl", name=band,
        )  # fmt: skip
        href = f"assets/{stac_items.SATELLITE}/{name}/{band}.tif"
        _write_file(folder, href, data)
        assets[band] = stac_items.asset_of(
            band, href, data, tile, kind=image.dtype.name, offset=offset, cell=cell
        )
    assets["thumbnail"] = _thumbnail(folder, stac_items.SATELLITE, name, picture)
    shares = _shares(classes)
    return stac_items.satellite_item(tile, product, take, shot.season, assets, shares)


def _shares(classes: NDArray[np.uint8]) -> Json:
    """Compute the percentages of classes, as archives state them."""
    valid = classes[classes > 0]

    def percent(*codes: int) -> float:
        return round(100 * float(np.isin(valid, codes).mean()), 3)

    return {
        "eo:cloud_cover": percent(8, 9),
        "s2:cloud_shadow_percentage": percent(3),
        "s2:water_percentage": percent(6),
        "s2:snow_ice_percentage": percent(11),
        "s2:vegetation_percentage": percent(4),
        "s2:nodata_pixel_percentage": round(100 * float((classes == 0).mean()), 3),
    }


def _render_aerial(
    folder: Path, view: sensors.View, product: Product, take: Take, shot: sensors.Shot
) -> Json:
    """Write the files of an aerial product and return its item."""
    tile = view.tile
    name = f"HR_{tile.name}_{take.moment:%Y%m%d}"
    bands = sensors.aerial_bands(shot)
    assets: Json = {}
    for band, image in bands.items():
        data = cog_bytes(image, tile.epsg, tile.west, tile.north, tile.gsd, name=band)
        href = f"assets/{stac_items.AERIAL}/{name}/{band}.tif"
        _write_file(folder, href, data)
        assets[band] = stac_items.asset_of(band, href, data, tile, kind="uint8", offset=0.0)
    rgb = np.stack([bands[band] for band in ("red", "green", "blue")])
    picture = (rgb / 255).astype(np.float32)
    assets["thumbnail"] = _thumbnail(folder, stac_items.AERIAL, name, picture)
    return stac_items.aerial_item(tile, take, shot.season, assets)


def _thumbnail(folder: Path, collection: str, name: str, picture: Floats32) -> Json:
    """Write the thumbnail of a scene, at half its size, and return its asset."""
    small = np.clip(sensors.halve(picture), 0, 1)
    data = png_bytes((small * 255).astype(np.uint8))
    href = f"assets/{collection}/{name}/thumbnail.png"
    _write_file(folder, href, data)
    return {
        "href": href, "type": "image/png", "roles": ["thumbnail"], "title": "Preview",
        **stac_items.checksum(data),
    }  # fmt: skip


def world_items(root: Path) -> Iterator[Json]:
    """Yield the items of a built world, sorted by collection and id."""
    for path in sorted((root / "items").glob("*/*.json")):
        yield json.loads(path.read_bytes())
