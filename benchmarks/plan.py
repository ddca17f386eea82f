"""Measure planning very many chips from metadata: seconds, memory, parts and task runs.

Nothing is fetched. Sentinel-2 tiles of 10,980 pixels in three UTM zones, which overlap at their
edges and repeat on many dates, are written as a saved search, searched, planned and recorded
(``windows.parquet``).

    python benchmarks/plan.py [--tiles 100000,1000000]
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
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BANDS = ("red", "green", "blue", "nir")
EDGE_PX, GSD_M, SIZE = 10_980, 10, 256
#: Whole cells of a tile on the ground grid.
CELLS = 42 * 42
SETTINGS = {"all": {}, "limits": {"max_dates": 2, "max_per_stratum": 500, "max_chips": 50_000}}


def main() -> None:
    """Measure each row in a process of its own, so that each reports its own memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiles", default="100000,1000000", help="candidate chips, at least")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
        return
    rows = []
    for tiles in map(int, options.tiles.split(",")):
        for name in SETTINGS:
            row = json.dumps({"tiles": tiles, "limits": name})
            done = subprocess.run([sys.executable, __file__, "--row", row], check=True,
                                  capture_output=True, text=True)  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    with (RESULTS / "plan.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(tiles: int, limits: str) -> dict[str, Any]:
    """Search, plan and record in an empty store."""
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import make_job, plan_parts, run_stage
    from data_catalog.storage.process import peak_memory_mib
    from data_catalog.store import open_store
    from flows.stage_flow import count_tasks
    from geofm.chips.cut import write_windows
    from geofm.chips.plan import plan_windows
    from geofm.config.recipe import CutSettings, SearchSettings
    from geofm.stages import get_stage

    scenes = -(-tiles // CELLS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        features = {"type": "FeatureCollection", "features": [scene(n) for n in range(scenes)]}
        (place / "items.json").write_text(json.dumps(features))
        store = open_store(place / "store")
        catalogue = open_catalogue(f"sqlite:///{place}/c.db", store)
        settings = CutSettings.model_validate(
            {"size_px": SIZE, "bands": list(BANDS), **SETTINGS[limits]}
        )
        marks = [time.perf_counter()]
        search = SearchSettings(stac=str(place / "items.json"), max_items=10**6)
        items = run_stage(get_stage("search"), store, catalogue, {}, search)
        marks.append(time.perf_counter())
        job = make_job(get_stage("cut"), store, {"items": items}, settings)
        parts = plan_parts(get_stage("cut"), job)
        marks.append(time.perf_counter())
        found = plan_windows(job)
        write_windows(found, place / "windows.parquet")
        marks.append(time.perf_counter())
        files = [place / "windows.parquet", store.plan_file(job.key)]
        record = sum(file.stat().st_size for file in files)
    search_s, plan_s, record_s = (b - a for a, b in pairwise(marks))
    workers = os.cpu_count() or 1
    tasks = {"search": 2, "cut": 2 + count_tasks(len(parts), workers, get_stage("cut").at_once)}
    return {
        "tiles": len(found.windows.reason), "limits": limits, "scenes": scenes,
        "planned": found.windows.counts().get("", 0), "parts": len(parts),
        "task_runs": sum(tasks.values()), "search_s": round(search_s, 2),
        "plan_s": round(plan_s, 2), "record_s": round(record_s, 2),
        "seconds": round(search_s + plan_s + record_s, 2),
        "record_mib": round(record / 2**20, 2),
        "peak_rss_mib": round(peak_memory_mib()),
        "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": f"geofm {version('geofm')} shapely {version('shapely')} "
        f"pandas {version('pandas')}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def scene(number: int) -> dict[str, Any]:
    """Make the item of a tile and date: 60 tiles in three zones, then the next date."""
    from pyproj import Transformer

    zone, tile, date = 31 + number % 3, number // 3 % 20, number // 60
    west, north = 399_960 + tile % 5 * 100_000, 5_400_000 + tile // 5 * 100_000
    move = Transformer.from_crs(32_600 + zone, 4326, always_xy=True).transform
    edge = EDGE_PX * GSD_M
    corners = [(west, north - edge), (west + edge, north - edge), (west + edge, north),
               (west, north)]  # fmt: skip
    ring = [list(move(*corner)) for corner in [*corners, corners[0]]]
    when = f"2023-{1 + date % 12:02d}-{1 + date // 12 % 28:02d}T10:00:00Z"
    assets = {
        band: {
            "href": f"https://data.example/{number}/{band}.tif",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "roles": ["data"],
            "eo:bands": [{"name": band, "common_name": band}],
            "raster:bands": [{"nodata": 0, "scale": 0.0001}],
            "proj:shape": [EDGE_PX, EDGE_PX],
            "proj:transform": [GSD_M, 0, west, 0, -GSD_M, north],
        }
        for band in BANDS
    }
    properties = {
        "datetime": when, "proj:epsg": 32_600 + zone, "eo:cloud_cover": number * 7 % 100,
        "s2:datatake_id": f"D{date}", "grid:code": f"T{zone}-{tile}",
        "s2:processing_baseline": "05.00", "s2:generation_time": when,
        "s2:product_uri": f"P{number}",
    }  # fmt: skip
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": f"scene-{number}", "links": [],
        "collection": "sentinel-2-l2a", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties, "assets": assets,
    }  # fmt: skip


if __name__ == "__main__":
    main()
