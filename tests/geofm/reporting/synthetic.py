"""A synthetic run: plausible artifacts with generated imagery, sealed in a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from shapely.geometry import box

from data_catalog.artifact import Artifact
from data_catalog.manifest import Manifest
from data_catalog.store import Store, list_files
from data_catalog.tables import write_table
from geofm.config.recipe import Recipe
from geofm.formats.npy import chip_bytes, pixel_sha256

BANDS = ["red", "green", "blue", "nir"]
SCALE = [1e-4] * 4
PLACES = [(13.0, 46.0), (-61.5, -3.2), (36.8, 29.1), (151.0, -33.4)]
EDGE = 0.006
#: A name that would break a page that does not escape names from catalogues.
HOSTILE = '<script>alert("x")</script><img src=http://example.org/x.png>'


def seal(
    store: Store, kind: str, stage: str, inputs: dict[str, Artifact], folder: Path, **more: Any
) -> Artifact:
    section = more.pop("settings", None) or getattr(Recipe(), stage)
    settings = section.model_dump(mode="json")
    manifest = Manifest(
        kind=kind,
        stage=stage,
        version="1",
        inputs={role: a.digest for role, a in inputs.items()},
        settings={**settings, **more.pop("overrides", {})},
        seed=0,
        software={"numpy": np.__version__},
        counts=more.pop("counts"),
        dropped=more.pop("dropped", {}),
        facts=more.pop("facts", {}),
        deterministic=True,
        files=list_files(folder),
    )
    return store.publish(folder, manifest)


def scene(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """Generate a landscape, uint16, shape (4, size, size): fields, forest, town or a coast."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = sum(
        np.sin(2 * np.pi * (rng.normal(0, f) * x + rng.normal(0, f) * y) + rng.uniform(0, 6)) / f
        for f in (1, 2, 4, 8, 12)
    )
    base = np.array(
        [
            [1400, 1300, 900, 2600],
            [420, 620, 380, 2900],
            [1500, 1450, 1350, 1900],
            [350, 600, 800, 250],
        ][kind]
    )
    pixels = base[:, None, None] * (1 + 0.12 * waves)
    if kind == 0:
        edge = int(rng.integers(6, 14))
        tint = rng.uniform(0.5, 1.5, (4, size // edge + 1, size // edge + 1))
        pixels *= tint.repeat(edge, 1).repeat(edge, 2)[:, :size, :size]
    if kind == 2:
        pixels *= 1 + 0.5 * ((x * 9 % 1 < 0.18) | (y * 7 % 1 < 0.2))
        pixels *= rng.uniform(0.7, 1.5, (1, size, size))
    pixels *= rng.normal(1, 0.03, pixels.shape)
    return np.clip(pixels, 1, 10_000).astype(np.uint16)


THRESHOLDS = {
    "thresholds": {
        "planet-s2": {"threshold": 0.93, "source": "calibrated", "reason": "precise for sure",
                      "positives": 300, "negatives": 400},
        "planet-ls": {"threshold": 0.95, "source": "default", "reason": "too few pairs",
                      "positives": 3, "negatives": 12},
    }
}  # fmt: skip
LEAKS = {
    "chips_checked": 100, "chips_removed": 3, "removed_by": {"eval_pixels": 3},
    "sets": [{"name": "aid", "checked_by": ["pixels", "embedding"], "footprints": 0, "images": 40,
              "removed": 3}],
}  # fmt: skip


def _curve() -> pd.DataFrame:
    at = np.linspace(0.5, 1, 11)
    precision = np.minimum(1, 0.4 + at * 0.65)
    return pd.DataFrame(
        {"collection": "planet-s2", "class": "all", "threshold": at, "precision": precision,
         "recall": 1.5 - at}
    )  # fmt: skip


def _survival(rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"stratum_of": ["collection", "season", "season"], "stratum": ["planet-s2", "DJF", "JJA"],
         "candidates": [rows, rows // 2, rows - rows // 2], "passed": [rows - 2, 5, 4],
         "distinct": [rows - 3, 4, 3], "kept": [rows // 2, 3, 0]}
    )  # fmt: skip


def _measures() -> pd.DataFrame:
    return pd.DataFrame(
        {"choice": ["kept", "random"], "chips": 9, "facility_location": [0.91, 0.85],
         "covering_radius": [0.3, 0.6], "spectral_log_volume": [-17.4, None],
         "cluster_gini": [0.2, 0.3]}
    )  # fmt: skip


def make_run(
    store: Store,
    work: Path,
    *,
    per_scene: int = 16,
    size: int = 48,
    duplicates: bool = True,
    drops: bool = True,
    trained: bool = True,
) -> dict[str, Artifact]:
    """Make the artifacts by role; without ``trained`` there is no model and no scores."""
    rng = np.random.default_rng(7)
    items = _items(drops)
    folder = _folder(work, "items")
    write_table(items, folder / "items.parquet")
    gone = items[items["status"] != "ok"]["reason"].value_counts().to_dict()
    made: dict[str, Artifact] = {}
    made["items"] = seal(
        store,
        "items",
        "search",
        {},
        folder,
        dropped=gone,
        counts={"rows_in": len(items), "rows_out": int((items["status"] == "ok").sum())},
        overrides={"stac": "https://stac.example.org/v1", "max_items": 500},
    )
    made["chips"], vectors, twins = _chips(store, work, made, items, rng, per_scene, size)
    chips = made["chips"].table("chips.parquet")
    usable = chips[chips["status"] == "ok"].reset_index(drop=True)
    folder = _folder(work, "embeddings")
    np.save(folder / "embeddings.npy", vectors.astype(np.float16))
    write_table(usable[["chip_id"]], folder / "ids.parquet")
    made["embeddings"] = seal(
        store,
        "embeddings",
        "embed",
        {"chips": made["chips"]},
        folder,
        counts={"rows_in": len(usable), "rows_out": len(usable)},
        facts={
            "encoder": "efficientnet-lite0",
            "weights_sha256": "ab" * 32,
            "size_px": 128,
            "dim": vectors.shape[1],
        },
    )
    for kind, stage in (("descriptors", "describe"), ("pool", "pool"), ("buckets", "buckets"),
                        ("pairs", "pairs"), ("alike", "alike"),
                        ("calibration", "calibrate")):  # fmt: skip
        folder = _folder(work, kind)
        if kind == "calibration":
            write_table(_curve(), folder / "curve.parquet")
        made[kind] = seal(
            store,
            kind,
            stage,
            {"chips": made["chips"], "embeddings": made["embeddings"]},
            folder,
            settings=Recipe().curate,
            counts={"rows_in": len(usable), "rows_out": len(usable)},
            facts=THRESHOLDS if kind == "calibration" else {},
        )
    decisions = _decisions(usable, twins if duplicates else {}, rng, drops)
    folder = _folder(work, "decisions")
    write_table(decisions, folder / "decisions.parquet")
    write_table(_survival(len(usable)), folder / "survival.parquet")
    write_table(_measures(), folder / "measures.parquet")
    dropped = decisions[decisions["decision"] == "drop"]["rule"].value_counts().to_dict()
    kept = int((decisions["decision"] == "keep").sum())
    made["decisions"] = seal(
        store,
        "decisions",
        "curate",
        {k: made[k] for k in ("chips", "embeddings")},
        folder,
        counts={"rows_in": len(usable), "rows_out": kept},
        dropped=dropped,
        overrides={"budget": 0.6},
        facts={
            "threshold": 0.95,
            "certificate": {
                "queries": 200,
                "pairs": 412,
                "missed": 0,
                "confidence": 0.95,
                "recall_lower_bound": 0.99276,
            },
            "decontamination": LEAKS,
        },
    )
    made["dataset"] = _dataset(store, work, made, usable, decisions)
    if trained:
        _model_and_scores(store, work, made, rng)
    return made


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir(parents=True)
    return folder


def _items(drops: bool) -> gpd.GeoDataFrame:
    rows = []
    for place, (lon, lat) in enumerate(PLACES):
        for day, collection in enumerate(("planet-s2", "planet-s2", "planet-ls")):
            rows.append(
                {
                    "item_id": f"SCENE_{place}_{day}",
                    "collection": collection,
                    "datetime": f"2024-0{day + 4}-1{place}T10:00:00Z",
                    "geometry": box(lon, lat, lon + 8 * EDGE, lat + 8 * EDGE),
                    "licence": "CC-BY-4.0" if collection == "planet-s2" else "PDDL-1.0",
                    "status": "ok",
                    "reason": "",
                }
            )
    if drops:
        for extra, (status, why) in enumerate(
            [("dropped", "superseded"), ("dropped", "superseded"), ("quarantined", "bad_geometry")]
        ):
            rows.append({**rows[extra], "item_id": f"OLD_{extra}", "status": status, "reason": why})
        rows.append({**rows[0], "item_id": HOSTILE, "status": "quarantined", "reason": "bad_id"})
    frame = pd.DataFrame(rows)
    frame["item_sha256"] = "0" * 64
    frame["item_json"] = "{}"
    frame["source"] = "planet"
    frame["superseded_by"] = ""
    frame["cloud_cover"] = 3.0
    return gpd.GeoDataFrame(frame, geometry="geometry", crs="EPSG:4326")


def _chips(
    store: Store,
    work: Path,
    made: dict[str, Artifact],
    items: pd.DataFrame,
    rng: np.random.Generator,
    per_scene: int,
    size: int,
) -> tuple[Artifact, np.ndarray, dict[str, tuple[str, float]]]:
    folder = _folder(work, "chips")
    (folder / "parts").mkdir()
    side = int(np.sqrt(per_scene))
    rows: list[dict[str, Any]] = []
    vectors, twins = [], {}
    centres = rng.normal(size=(4, 24)) * 2
    first: dict[tuple[int, int], tuple[str, np.ndarray, np.ndarray]] = {}
    for number, item in enumerate(items[items["status"] == "ok"].itertuples()):
        place, data = number // 3, bytearray()
        west, south, *_ = item.geometry.bounds
        for cell in range(side * side):
            kind = (place + cell // side) % 4
            chip_id = f"{number:04x}{cell:04x}".ljust(24, "c")
            again = first.get((place, cell))
            if again is not None and rng.random() < 0.45:
                pixels = np.clip(again[1] * rng.normal(1, 0.02), 1, 10_000).astype(np.uint16)
                vector = again[2] + rng.normal(size=24) * 0.12
                twins[chip_id] = (again[0], float(rng.uniform(0.951, 0.999)))
            else:
                pixels, vector = scene(rng, kind, size), centres[kind] + rng.normal(size=24)
                first.setdefault((place, cell), (chip_id, pixels, vector))
            encoded = chip_bytes(pixels)
            x, y = west + cell % side * EDGE, south + cell // side * EDGE
            bad = rng.random() < 0.04
            rows.append(
                {
                    "chip_id": chip_id,
                    "item_id": item.item_id,
                    "collection": item.collection,
                    "geometry": box(x, y, x + EDGE, y + EDGE),
                    "bands": BANDS,
                    "scale": SCALE,
                    "dtype": "uint16",
                    "pixel_sha256": pixel_sha256(pixels),
                    "valid_fraction": 1.0,
                    "cloud_fraction": float(rng.beta(1, 12)),
                    "part": f"parts/{number:02}.bin",
                    "offset": len(data),
                    "size": len(encoded),
                    "status": "dropped" if bad else "ok",
                    "reason": "overlap" if bad else "",
                    "witness": "",
                    "datetime": item.datetime,
                    "licence": item.licence,
                }
            )
            data += encoded
            if not bad:
                vectors.append(vector)
        (folder / "parts" / f"{number:02}.bin").write_bytes(bytes(data))
    frame = gpd.GeoDataFrame(pd.DataFrame(rows), geometry="geometry", crs="EPSG:4326")
    write_table(frame, folder / "chips.parquet")
    assets = [("SCENE_0_0", "B02", "ok", ""), ("SCENE_1_1", "B04", "quarantined", "not_found")]
    names = ["item_id", "asset", "status", "reason"]
    write_table(pd.DataFrame(assets, columns=names), folder / "assets.parquet")
    lost = int((frame["status"] != "ok").sum())
    artifact = seal(
        store,
        "chips",
        "cut",
        {"items": made["items"]},
        folder,
        counts={"rows_in": len(frame), "rows_out": len(frame) - lost},
        dropped={"overlap": lost},
        overrides={"size_px": size, "bands": BANDS},
    )
    good = set(frame.loc[frame["status"] == "ok", "chip_id"])
    twins = {a: (b, s) for a, (b, s) in twins.items() if a in good and b in good}
    return artifact, np.array(vectors), twins


def _decisions(
    usable: pd.DataFrame,
    twins: dict[str, tuple[str, float]],
    rng: np.random.Generator,
    drops: bool,
) -> pd.DataFrame:
    rows = []
    for chip in usable.itertuples():
        row = {
            "chip_id": chip.chip_id,
            "decision": "keep",
            "rule": "kept",
            "reason": "kept",
            "witness_id": "",
            "similarity": np.nan,
            "quality": float(rng.beta(9, 1.4)),
            "entropy": float(rng.normal(5.2, 0.7)),
            "gradient": float(rng.gamma(3, 0.02)),
            "valid": 1.0,
            "cloud": chip.cloud_fraction,
            "saturated": 0.0,
            "cluster": chip.chip_id,
        }
        if drops and chip.cloud_fraction > 0.25:
            row |= {"decision": "drop", "rule": "gate_cloud", "reason": "too cloudy"}
        elif chip.chip_id in twins:
            witness, similarity = twins[chip.chip_id]
            row |= {
                "decision": "drop",
                "rule": "near_duplicate",
                "witness_id": witness,
                "similarity": similarity,
                "cluster": witness,
                "entropy": row["entropy"] - 0.4,
                "reason": f"cosine similarity {similarity:.4f} to {witness}, which is kept",
            }
        elif drops and rng.random() < 0.15 and chip.chip_id not in {w for w, _ in twins.values()}:
            row |= {
                "decision": "drop",
                "rule": "selection",
                "similarity": rng.uniform(0.4, 0.94),
                "reason": "not chosen within curate.budget 0.6",
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _dataset(
    store: Store, work: Path, made: dict[str, Artifact], usable: pd.DataFrame, rows: pd.DataFrame
) -> Artifact:
    folder = _folder(work, "dataset")
    kept = usable[usable["chip_id"].isin(rows.loc[rows["decision"] == "keep", "chip_id"])]
    (folder / "shards").mkdir()
    for shard in range(3):
        (folder / "shards" / f"corpus-{shard:05}.tar").write_bytes(b"\0" * 700_000)
    write_table(kept.reset_index(drop=True), folder / "samples.parquet")
    stats = {"bands": BANDS, "mean": [0.3] * 4, "std": [0.1] * 4, "count": len(kept)}
    (folder / "stats.json").write_text(json.dumps(stats))
    sizes = kept.groupby("licence").size()
    sources = [
        {"source": "planet", "licence": str(name), "rows": int(n), "attribution": "Made up, 2024"}
        for name, n in sizes.items()
    ]
    inputs = {k: made[k] for k in ("items", "chips", "decisions")}
    return seal(
        store,
        "dataset",
        "pack",
        inputs,
        folder,
        facts={"sources": sources, "mean": [0.3] * 4},
        counts={"rows_in": len(kept), "rows_out": len(kept)},
        overrides={"shard_mib": 1.0},
    )


def _model_and_scores(
    store: Store, work: Path, made: dict[str, Artifact], rng: np.random.Generator
) -> None:
    folder = _folder(work, "model")
    steps = np.arange(0, 240)
    noise = rng.normal(0, 0.02, (2, len(steps)))
    mim, distill = 0.35 + 0.6 * np.exp(-steps / 60), -0.9 + 0.8 * np.exp(-steps / 50)
    rate = 4e-3 * np.minimum(steps / 40, 0.5 + 0.5 * np.cos(np.pi * np.clip(steps / 240, 0, 1)))
    metrics = pd.DataFrame({"step": steps, "epoch": steps / 20, "mim": mim + noise[0]})
    metrics = metrics.assign(distill=distill + noise[1], lr=rate, loss=mim + distill, grad_norm=1.0)
    write_table(metrics, folder / "metrics.parquet")
    facts = {"teacher": "efficientnet-lite0", "teacher_weights_sha256": "cd" * 32, "steps": 240}
    made["model"] = seal(
        store,
        "model",
        "pretrain",
        {"dataset": made["dataset"]},
        folder,
        facts=facts,
        counts={"rows_in": 240, "rows_out": 240},
        overrides={"epochs": 12, "batch": 32},
    )
    folder = _folder(work, "scores")
    levels = {
        ("teacher", "final"): 0.83,
        ("random", "distilled"): 0.52,
        ("random", "final"): 0.47,
        ("model", "distilled"): 0.79,
        ("model", "final"): 0.71,
    }
    rows = [
        {
            "model": m,
            "feature": f,
            "task": "planet land cover",
            "protocol": p,
            "metric": "accuracy",
            "value": v + d,
            "ci_low": v + d - 0.05,
            "ci_high": v + d + 0.05,
            "n": 240,
            "seed": 0,
        }
        for (m, f), v in levels.items()
        for p, d in (("knn5", 0.0), ("linear", 0.06))
    ]
    write_table(pd.DataFrame(rows), folder / "scores.parquet")
    differences = [
        {
            "task": "planet land cover",
            "feature": f,
            "protocol": p,
            "against": a,
            "value": v,
            "ci_low": v - 0.06,
            "ci_high": v + 0.06,
            "n": 240,
            "certain": abs(v) > 0.06,
        }
        for f in ("distilled", "final")
        for p in ("knn5", "linear")
        for a, v in (("random", 0.26), ("teacher", -0.04))
    ]
    task = {
        "task": "planet land cover",
        "classes": list("abcdef"),
        "filled_bands": [],
        "leakage": {"identical": 0, "test_images": 240, "training_samples": 70},
    }
    made["scores"] = seal(
        store,
        "scores",
        "evaluate",
        {"model": made["model"], "dataset": made["dataset"]},
        folder,
        counts={"rows_in": 800, "rows_out": 800},
        facts={"tasks": [task], "differences": differences, "training_seeds": 1},
    )
