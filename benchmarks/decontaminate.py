"""Plant leaks of evaluation sets in a pool, and measure the hits and errors of each rule.

*AID*: 8-bit aerial scenes of 30 classes (a folder per class). Some scenes are the evaluation set.
The pool gets these scenes flipped or rotated, windows of them shifted by up to 12 % of the edge,
and both with another gain. The other scenes of the folder must stay. *World*: chips of real
Sentinel-2 scenes. Half of the places are the evaluation set, as footprints of date 1 and as 16-bit
images (in 8 bits the world's monotone sea has no recognisable content). Leaks are the same places
on the other date, which only a footprint can detect, and rotated and shifted copies without a
footprint. *Footprints*: chips all over the Earth, with poles and antimeridian, at distances on both
sides of the buffer, compared with geodesic distances by pyproj.

Thresholds were chosen on the scenes with odd numbers (``--part odd``); the even ones are reported.

    python benchmarks/decontaminate.py --aid DIR --world DIR
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import shapely
import torch
from eo_pool import BANDS, SCALE, SIZE, read_scenes, turned
from numpy.typing import NDArray
from PIL import Image
from pyproj import Geod

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results"
Json = dict[str, Any]
#: Edge of AID's windows; the scenes have 150 px, which leaves space for shifts.
AID_PX = 128


def main() -> None:
    """Write ``decontaminate.csv``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--aid", type=Path, help="AID: a folder per class")
    parser.add_argument("--world", type=Path, help="a world of scenes")
    parser.add_argument("--part", choices=("even", "odd"), default="even")
    parser.add_argument("--leaks", type=int, default=240, help="evaluation images of AID")
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    rows = footprints(options.seed)
    if options.aid:
        rows += aid(options.aid, options.part == "even", options.leaks, options.seed)
    if options.world:
        rows += world(options.world, options.part == "even", options.seed)
    for row in rows:
        row.update(
            machine=platform.machine(), cores=len(os.sched_getaffinity(0)),
            versions=" ".join(f"{n} {version(n)}" for n in ("geofm", "numpy", "shapely", "torch")),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
        )  # fmt: skip
        print({key: value for key, value in row.items() if value != ""}, flush=True)
    if options.part == "even":
        with (RESULTS / "decontaminate.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for r in rows for k in r)), "")
            writer.writeheader()
            writer.writerows(rows)


def footprints(seed: int, chips: int = 20_000, areas: int = 2000) -> list[Json]:
    """Check chips at 0.2 to 1.8 buffers from evaluation areas against geodesic distances."""
    from geofm.pool.proximity import near_areas

    draw, geod, buffer_m = np.random.default_rng(seed), Geod(ellps="WGS84"), 1000.0
    lat = np.degrees(np.arcsin(draw.uniform(-1, 1, areas)))
    lat[: areas // 20] = draw.uniform(89.5, 90, areas // 20) * draw.choice([-1, 1], areas // 20)
    lon = draw.uniform(-180, 180, areas)
    lon[areas // 20 : areas // 5] = np.where(draw.random(areas // 5 - areas // 20) < 0.5, 180, -180)
    which = draw.integers(0, areas, chips)
    away = buffer_m * draw.uniform(0.2, 1.8, chips)
    to_lon, to_lat, _ = geod.fwd(lon[which], lat[which], draw.uniform(0, 360, chips), away)
    began = time.perf_counter()
    near = near_areas(shapely.points(to_lon, to_lat), shapely.points(lon, lat), buffer_m)
    seconds = time.perf_counter() - began
    _, _, metres = geod.inv(to_lon[near.left], to_lat[near.left], lon[near.right], lat[near.right])
    got = np.zeros(chips, bool)
    got[near.left] = True
    inside = away <= buffer_m
    # a chip outside the buffer of its own area may lie in the buffer of another area
    wrong = np.setdiff1d(near.left, near.left[metres <= buffer_m * 1.01])
    return [{
        "pool": "footprints", "leak": f"within {buffer_m:g} m", "rule": "eval_footprint",
        "planted": int(inside.sum()), "found": int(got[inside].sum()),
        "recall": round(float(got[inside].mean()), 5), "clean": int((~inside).sum()),
        "removed_by_mistake": len(wrong),
        "false_share": round(len(wrong) / int((~inside).sum()), 5), "seconds": round(seconds, 2),
    }]  # fmt: skip


def run(
    name: str,
    pool: list[NDArray[Any]],
    kinds: list[str],
    areas: NDArray[np.object_],
    images: dict[str, NDArray[Any]],
    places: list[Any],
    bands: list[str],
    scale: list[float],
) -> list[Json]:
    """Describe, embed and check a pool; a row per kind of leak, and a row for the other chips."""
    from geofm.dedup.descriptors import measure
    from geofm.dedup.perceptual_hash import hash_thumbnails
    from geofm.embeddings.embed import chip_encoder
    from geofm.embeddings.encoders import features
    from geofm.embeddings.images import prepare_chip
    from geofm.embeddings.vectors import make_space
    from geofm.pool.decontaminate import decontaminate, view_images
    from geofm.pool.registry import load_registry

    encoder = chip_encoder("efficientnet-lite0", 128, "cpu")
    found = [measure(chip, bands, scale) for chip in pool]
    table = pd.DataFrame([row for row, _ in found])
    thumbnails = np.stack([thumbnail for _, thumbnail in found])
    table["hash"] = hash_thumbnails(thumbnails)
    vectors = []
    for first in range(0, len(pool), 16):
        some = [prepare_chip(chip, bands, scale, encoder, 128) for chip in pool[first : first + 16]]
        vectors.append(features(encoder, torch.stack(some)).numpy())
    space = make_space(np.concatenate(vectors).astype(np.float16))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "bench").mkdir()
        for image_id, rgb in images.items():
            if rgb.dtype == np.uint8:
                Image.fromarray(rgb.transpose(1, 2, 0)).save(root / "bench" / f"{image_id}.png")
                continue
            with rasterio.open(
                root / "bench" / f"{image_id}.tif",
                "w",
                driver="GTiff",
                count=3,
                dtype=rgb.dtype,
                height=rgb.shape[1],
                width=rgb.shape[2],
            ) as file:
                file.write(rgb)  # fmt: skip
        if places:
            frame = gpd.GeoDataFrame({"id": range(len(places))}, geometry=places, crs=4326)
            frame.to_file(root / "bench.geojson", driver="GeoJSON")
        sets = load_registry(root)
        began = time.perf_counter()
        views = view_images(sets, encoder=encoder)
        viewed = time.perf_counter()
        result = decontaminate(areas, table, thumbnails, space, sets, views)
        seconds = time.perf_counter() - viewed
    rule = dict(zip(result.rows["row"], result.rows["rule"], strict=True))
    rows = []
    for kind in dict.fromkeys(kinds):
        mine = [row for row, one in enumerate(kinds) if one == kind]
        hits = [rule[row] for row in mine if row in rule]
        by = " ".join(f"{r}={hits.count(r)}" for r in sorted(set(hits)))
        row: Json = {"pool": name, "leak": kind, "rule": by}
        if kind == "clean":
            row |= {"clean": len(mine), "removed_by_mistake": len(hits),
                    "false_share": round(len(hits) / len(mine), 5)}  # fmt: skip
        else:
            row |= {"planted": len(mine), "found": len(hits),
                    "recall": round(len(hits) / len(mine), 4)}  # fmt: skip
        note = f"{len(views)} views described and embedded in {viewed - began:.1f} s"
        rows.append({**row, "seconds": round(seconds, 2), "note": note})
    return rows


def leak(
    draw: np.random.Generator, whole: NDArray[Any], top: int, left: int, edge: int
) -> list[tuple[str, NDArray[Any]]]:
    """Copy a window of an image: rotated, shifted, and both with another gain."""
    room = [min(start, round(0.12 * edge)) for start in (top, left)]
    beyond = [min(n - start - edge, round(0.12 * edge))
              for n, start in zip(whole.shape[1:], (top, left), strict=True)]  # fmt: skip
    down, across = (int(draw.integers(-a, b + 1)) for a, b in zip(room, beyond, strict=True))
    same = whole[:, top : top + edge, left : left + edge]
    moved = whole[:, top + down : top + down + edge, left + across : left + across + edge]
    which = int(draw.integers(1, 8))
    least, most = (1, 255) if whole.dtype == np.uint8 else (1, 65_535)
    gain = np.clip(np.rint(moved * draw.uniform(0.8, 1.2)), least, most).astype(whole.dtype)
    return [
        ("same", same),
        ("turned", turned(same, which)),
        ("turned and moved", turned(moved, which)),
        ("turned, moved and brightened", turned(gain, which)),
    ]


def aid(folder: Path, even: bool, leaks: int, seed: int) -> list[Json]:
    """Select every second scene; the first ones in a random order are the evaluation set."""
    draw = np.random.default_rng(seed)
    files = [f for f in sorted(folder.glob("*/*.jpg"))
             if (int(f.stem.rpartition("_")[2]) % 2 == 0) == even]  # fmt: skip
    order = draw.permutation(len(files))
    images, pool, kinds = {}, [], []
    for place, number in enumerate(order):
        whole = np.asarray(Image.open(files[number]).convert("RGB")).transpose(2, 0, 1)
        start = (whole.shape[1] - AID_PX) // 2
        middle = whole[:, start : start + AID_PX, start : start + AID_PX]
        if place >= leaks:
            pool.append(middle)
            kinds.append("clean")
            continue
        images[files[number].stem] = middle
        for kind, copy in leak(draw, whole, start, start, AID_PX):
            pool.append(copy)
            kinds.append(kind)
    areas = np.full(len(pool), None, dtype=object)
    return run("AID", pool, kinds, areas, images, [], ["red", "green", "blue"], [1.0] * 3)


def world(folder: Path, even: bool, seed: int) -> list[Json]:
    """Select the places of a world; every second one is an evaluation place."""
    draw = np.random.default_rng(seed)
    images: dict[str, NDArray[Any]] = {}
    pool, kinds, areas, places = [], [], [], []
    days: dict[str, int] = {}
    for scene in read_scenes(folder):
        first = days.setdefault(scene.tile, 0) == 0
        days[scene.tile] += 1
        rows, cols = scene.counts.shape[1:]
        for number, (top, left) in enumerate(
            (t, x) for t in range(0, rows - SIZE + 1, SIZE) for x in range(0, cols - SIZE + 1, SIZE)
        ):
            chip = scene.counts[:, top : top + SIZE, left : left + SIZE]
            if chip.min() == 0:
                continue
            # synthetic places, equal for both dates, far apart between tiles
            lon, lat = (sum(map(ord, scene.tile)) * 7.31) % 340 - 170, (ord(scene.tile[2]) - 77) * 5
            west, north = lon + left * 1e-4, lat - top * 1e-4
            area = shapely.box(west, north - SIZE * 1e-4, west + SIZE * 1e-4, north)
            if (number // 2 % 2 == 0) != even:
                continue
            if number % 2 == 0:
                if first:
                    places.append(area)
                    images[f"{scene.item}-{number}"] = chip[:3]
                    for kind, copy in leak(draw, scene.counts, top, left, SIZE):
                        pool.append(copy)
                        kinds.append(f"{kind}, no footprint")
                        areas.append(None)
                else:
                    pool.append(chip)
                    kinds.append("other date, by footprint")
                    areas.append(area)
            else:
                pool.append(chip)
                kinds.append("clean")
                areas.append(None)
    some = np.empty(len(areas), dtype=object)
    some[:] = areas
    return run("world", pool, kinds, some, images, places, BANDS, SCALE)


if __name__ == "__main__":
    main()
