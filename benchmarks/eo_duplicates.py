"""Measure near-duplicate search on chips of real scenes, beside common tools on the same chips.

The file has two tables. *Metadata*: search and cut of the test world; items and chips that were
dropped as reprocessed, second station or overlap are compared with the world's truth. *Pixels*:
chips of the world's scenes with planted copies (half a pixel by resampling, uneven haze, gain,
rotated or flipped) and overlapping windows of IoU 0.6 to 0.95. Two chips of an acquisition that
share at least 0.6 of their ground are duplicates; smaller overlaps do not count. All other pairs
are false, also pairs of other dates of a place and of the world's monotone sea.

Parameters were chosen on the cities of ``TUNED`` (``--pool tuned``); the other cities are reported.

    python benchmarks/eo_duplicates.py --world DIR --server serve_world.py --peers PYTHON

``--peers`` is a Python with imagededup, cleanvision and fastdup; see ``eo_peers.py``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from eo_pool import (
    BANDS,
    KINDS,
    SCALE,
    Scene,
    Window,
    overlaps,
    plant,
    quiet_sea,
    read_scenes,
)
from loopback import served
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

HERE = Path(__file__).parent
#: Tiles of the cities on which thresholds were chosen.
TUNED = {"39QZG", "40QBM", "39RYG", "22LHH", "49QHE", "49QGE", "50QKK", "30TWT", "30TXT", "31UDQ"}
#: IoU of a duplicate, minus the shift by resampling with half a pixel.
SAME = 0.59
Json = dict[str, Any]


def main() -> None:
    """Write ``eo-duplicates.csv``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--server", type=Path, help="the script that serves the world")
    parser.add_argument("--peers", type=Path, help="Python with the peers installed")
    parser.add_argument("--pool", choices=("reported", "tuned"), default="reported")
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    rows: list[Json] = []
    truth = json.loads((options.world / "truth.json").read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.server and options.pool == "reported":
            rows += metadata(options.world, options.server, truth, place)
        tuned = options.pool == "tuned"
        scenes = [scene for scene in read_scenes(options.world) if (scene.tile in TUNED) == tuned]
        if tuned:  # the world's own sea is among the reported cities
            scenes += [quiet_sea(scenes[0], 5), quiet_sea(scenes[2], 6)]
        pool = plant(scenes, options.seed)
        water = sea_items(truth)
        rows += ours(pool, scenes, water, place)
        if options.peers:
            rows += peers(options.peers, pool, scenes, water, place)
    for row in rows:
        print({key: value for key, value in row.items() if value != ""}, flush=True)
    if options.pool == "reported":
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (HERE / "results" / "eo-duplicates.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def about(tool: str, setting: str, names: tuple[str, ...] = ("geofm", "numpy", "torch")) -> Json:
    """Return the first columns of a row."""
    return {
        "tool": tool, "setting": setting, "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": " ".join(f"{name} {version(name)}" for name in names),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def sea_items(truth: Json) -> set[str]:
    """Return the items that are monotone water by the truth table."""
    return {item for c in truth["cases"] if c["kind"] == "monotone" for item in c["items"]}


def metadata(world: Path, server: Path, truth: Json, place: Path) -> list[Json]:
    """Measure recall and precision of the identity and overlap rules."""
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import run_stage
    from data_catalog.store import open_store
    from geofm.chips import cut
    from geofm.config.recipe import CutSettings, SearchSettings
    from geofm.stac import search

    store = open_store(place / "store")
    catalogue = open_catalogue(f"sqlite:///{place}/c.db", store)
    with served([sys.executable, server, world, "--port", "0"]) as url:
        address = url.rstrip("/")
        found = run_stage(search.STAGE, store, catalogue, {}, SearchSettings(stac=address))
        settings = CutSettings(bands=BANDS, size_px=128)
        chips = run_stage(cut.STAGE, store, catalogue, {"items": found}, settings)
    items, cells = found.table("items.parquet"), chips.table("chips.parquet")
    items = items[items["collection"] == "sentinel-2-l1c"]
    rows = []
    for kind in ("reprocessed", "second_station"):
        got = set(items[items["reason"] == kind]["item_id"])
        wanted: set[str] = set()
        for case in (case for case in truth["cases"] if case["kind"] == kind):
            some = set(case["items"])
            # of two stations, any may stay
            wanted |= some & got if case.get("either") else set(case["expect"]["drop"])
            if case.get("either") and len(some - got) != 1:
                wanted |= set(case["expect"]["drop"])
        rows.append({**about("geofm metadata", kind), **rates(got, wanted)})
    lost = cells[cells["reason"] == "overlap"]
    planted = {item for c in truth["cases"] if c["kind"] == "tile_overlap" for item in c["items"]}
    kept = cells[(cells["status"] == "ok") & cells["item_id"].isin(planted)]
    twice = {
        row.chip_id
        for case in truth["cases"] if case["kind"] == "tile_overlap"
        for row in kept[kept["item_id"] == case["items"][0]].itertuples()
        if max(
            row.geometry.intersection(area).area / row.geometry.area
            for area in kept[kept["item_id"] == case["items"][1]].geometry
        ) > 0.51
    }  # fmt: skip
    got = set(lost["chip_id"])
    explained = set(lost[lost["item_id"].isin(planted)]["chip_id"])
    rows.append({**about("geofm metadata", "tile_overlap"), **rates(got, explained | twice)})
    return rows


def rates(got: set[str], wanted: set[str]) -> Json:
    """Compute recall and precision of a set."""
    common = len(got & wanted)
    return {
        "planted": len(wanted), "found": len(got),
        "recall": round(common / max(len(wanted), 1), 4),
        "precision": round(common / max(len(got), 1), 4),
    }  # fmt: skip


def judge(pairs: Any, pool: list[Window], scenes: list[Scene], water: set[str]) -> Json:
    """Compute recall by kind, precision over all pairs, and both on water."""
    low, high = np.minimum(*pairs), np.maximum(*pairs)
    codes = np.unique(low[low < high] * len(pool) + high[low < high])
    left, right = codes // len(pool), codes % len(pool)
    iou = overlaps(pool)[left, right]
    got = set(codes.tolist())
    sea = np.array([scenes[w.scene].item in water for w in pool])
    hit = np.array([w.base * len(pool) + n in got for n, w in enumerate(pool)])
    of = {kind: np.array([w.kind == kind for w in pool]) for kind in KINDS}
    copies = np.any([of[kind] for kind in KINDS if kind != "overlap"], axis=0)
    true, false = int((iou >= SAME).sum()), int((iou == 0).sum())
    either = sea[left] | sea[right]
    return {
        "chips": len(pool), "found": len(codes),
        **{f"recall_{kind}": share(hit[mine]) for kind, mine in of.items()},
        "recall_copies": share(hit[copies]),
        "precision": round(true / max(true + false, 1), 4),
        "false_pairs": false, "partial_pairs": len(codes) - true - false,
        "water_chips": int(sea.sum()), "water_recall_copies": share(hit[copies & sea]),
        "water_recall_overlap": share(hit[of["overlap"] & sea]),
        "water_false_pairs": int((either & (iou == 0)).sum()),
    }  # fmt: skip


def share(hits: Any) -> float | str:
    """Return the mean of flags; empty if there are none."""
    return round(float(hits.mean()), 4) if len(hits) else ""


def ours(pool: list[Window], scenes: list[Scene], water: set[str], place: Path) -> list[Json]:
    """Run the stages describe and embed, and find pairs by each evidence."""
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import run_stage
    from data_catalog.store import open_store
    from geofm.config.recipe import EmbedSettings, RecipeSection
    from geofm.dedup import describe
    from geofm.dedup.alike import MOST_PROPOSED, find_pixel_duplicates, load_signatures
    from geofm.dedup.perceptual_hash import near_by_hash, unique_pairs
    from geofm.dedup.signature import best_agreeing
    from geofm.embeddings import embed
    from geofm.embeddings.vectors import make_space
    from tests.geofm.dedup.search import find_edges
    from tests.geofm.dedup.synthetic import Chip, make_chips

    store = open_store(place / "pool")
    catalogue = open_catalogue(f"sqlite:///{place}/p.db", store)
    made = [Chip(w.pixels, bands=BANDS, scale=SCALE[0]) for w in pool]
    chips = {"chips": make_chips(store, made, per_part=64)}
    ids = [chip.chip_id(n) for n, chip in enumerate(made)]
    began = time.perf_counter()
    found = run_stage(describe.STAGE, store, catalogue, chips, RecipeSection())
    described = time.perf_counter() - began
    table, thumbnails = describe.load_descriptors(found, ids)
    signatures = load_signatures(found)[describe.load_described(found, ids).index]
    contrast = table[["thumbnail_low", "thumbnail_high"]].to_numpy(np.float32)
    nothing = np.empty(0, np.int64), np.empty(0, np.int64)
    rows = []
    for setting in ("hash", "signature", "hash and signature"):
        began = time.perf_counter()
        hashes = table["hash"].to_numpy(np.uint64)
        by_hash = near_by_hash(hashes) if "hash" in setting else nothing
        agreed = nothing
        if "signature" in setting:  # as the stage does: each chip proposes its best pairs
            itself = np.eye(len(pool), dtype=np.bool_)
            rank = np.argsort(np.argsort(ids))
            agreed = best_agreeing(signatures, signatures, itself, rank, MOST_PROPOSED)
        sides = (np.concatenate(side) for side in zip(by_hash, agreed, strict=True))
        left, right = unique_pairs(*sides, len(pool))
        duplicates = find_pixel_duplicates(thumbnails, contrast, left, right)
        took = time.perf_counter() - began
        rows.append({**about("geofm pixels", setting),
                     **judge((duplicates.left, duplicates.right), pool, scenes, water),
                     "seconds": round(described + took, 2),
                     "chips_per_s": round(len(pool) / (described + took), 1),
                     "note": f"{len(left)} pairs compared in {took:.1f} s"})  # fmt: skip
    vectors = run_stage(embed.STAGE, store, catalogue, chips, EmbedSettings())
    assert vectors.table("ids.parquet")["chip_id"].tolist() == ids
    space = make_space(np.load(vectors.local("embeddings.npy")))
    for threshold in (0.8, 0.9, 0.95):
        edges = find_edges(space, threshold)
        rows.append({**about("geofm embedding alone", f"cosine {threshold:g}"),
                     **judge((edges.left, edges.right), pool, scenes, water)})  # fmt: skip
    return rows


def peers(
    python: Path, pool: list[Window], scenes: list[Scene], water: set[str], place: Path
) -> list[Json]:
    """Run the other tools on the same chips as PNG files."""
    from geofm.raster.radiometry import to_rgb

    folder = place / "png"
    folder.mkdir()
    for number, window in enumerate(pool):
        rgb = np.rint(to_rgb(window.pixels, BANDS, SCALE) * 255).astype(np.uint8)
        Image.fromarray(rgb.transpose(1, 2, 0)).save(folder / f"{number:06d}.png")
    rows = []
    for tool in ("imagededup", "cleanvision", "fastdup"):
        done = subprocess.run(
            [python, HERE / "eo_peers.py", tool, folder], capture_output=True, text=True,
            check=False, timeout=600, env={**os.environ, "SENTRY_OPT_OUT": "1"},
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            one = json.loads(line)
            pairs = np.array(one.pop("pairs"), dtype=np.int64).reshape(-1, 2).T
            rows.append({**about(tool, one.pop("setting")), **judge(pairs, pool, scenes, water),
                         **one, "chips_per_s": round(len(pool) / one["seconds"], 1)})  # fmt: skip
        if not lines:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            rows.append({**about(tool, "does not run"), "note": last[:200]})
    return rows


if __name__ == "__main__":
    main()
