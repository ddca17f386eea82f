"""A model as a STAC item of the Machine Learning Model extension (MLM 1.4).

Its place and time are those of the samples it was trained on: where and when it has seen anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import shapely
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from data_catalog.artifact import Artifact
from data_catalog.hashing import sha256_file
from data_catalog.manifest import MANIFEST
from geofm.pretraining.export.model import CONFIG, MODEL, read_config
from geofm.shards.croissant import licences
from geofm.shards.split import TRAIN
from geofm.types import Json

EXTENSIONS = (
    "https://stac-extensions.github.io/mlm/v1.4.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
#: A multihash that is a SHA-256 of 32 bytes begins like this (STAC file extension).
SHA256 = "1220"
#: Corners that a footprint may have; beyond, it is covered by boxes of these many degrees.
MOST_CORNERS = 1000
GRIDS = (0.01, 0.1, 1.0)
#: The extension's own span for a model that is bound to no time.
ALWAYS = ("1900-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
#: Features are compared with each other: the nearest of the extension's tasks.
TASKS = ["similarity-search"]
OUTPUTS = {
    "final": "Mean over the normalised last map: what the model gives when it is called.",
    "distilled": "Mean over the distilled stage without a norm; of a Swin with its patch merging.",
}


def mlm_item(model: Artifact, dataset: Artifact, title: str, folder: Path | None = None) -> Json:
    """The item of a model.

    Args:
        model: an artifact of kind ``model``.
        dataset: what it was trained on.
        title: its name.
        folder: a copy of the model in which the item will lie; by default its assets are in the
            store.
    """
    config = read_config(model)
    samples = training_samples(dataset)
    covered = cover(samples.geometry.to_numpy())
    terms = licences(model)
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(EXTENSIONS),
        "id": f"{title}-{model.digest[:12]}",
        "geometry": mapping(covered),
        "bbox": list(covered.bounds),
        "properties": {
            **time_span(samples),
            "title": title,
            "description": f"{config['architecture']} pretrained by geofm on {len(samples)} image "
            "chips; gives features, has no classes.",
            **({"license": " AND ".join(terms)} if terms else {}),
            "bands": [{"name": band} for band in config["geofm"]["bands"]],
            **_properties(model, config, title),
        },
        "assets": _assets(model, folder),
        "links": [
            {
                "rel": "derived_from",
                "href": f"urn:sha256:{dataset.digest}",
                "title": f"dataset {dataset.manifest.facts.get('name', '')}, SHA-256 of its "
                "manifest",
            }
        ],
    }


def _properties(model: Artifact, config: Json, title: str) -> Json:
    """The fields of the extension."""
    manifest, given, ours = model.manifest, config["pretrained_cfg"], config["geofm"]
    rules = "; ".join(f"{kind}: {rule}" for kind, rule in ours["unit"].items())
    return {
        "mlm:name": title,
        "mlm:architecture": config["architecture"],
        "mlm:tasks": TASKS,
        "mlm:framework": "pytorch",
        "mlm:framework_version": manifest.software["torch"],
        "mlm:accelerator": None,  # needs none in particular
        "mlm:accelerator_constrained": False,
        "mlm:accelerator_summary": "any processor or GPU that PyTorch runs on; trained on "
        f"{manifest.facts['arithmetic']}",
        "mlm:total_parameters": manifest.facts["parameters"],
        "mlm:pretrained": True,
        "mlm:pretrained_source": f"geofm dataset {manifest.inputs['dataset']}",
        "mlm:hyperparameters": {
            name: value for name, value in manifest.settings.items() if value not in (None, {})
        },
        "mlm:input": [
            {
                "name": "unit pixels",
                "bands": ours["bands"],
                "input": {
                    "shape": [-1, *given["input_size"]],
                    "dim_order": ["batch", "bands", "height", "width"],
                    "data_type": "float32",
                },
                "resize_type": "interpolation-linear",
                "value_scaling": [
                    {"type": "z-score", "mean": mean, "stddev": std}
                    for mean, std in zip(given["mean"], given["std"], strict=True)
                ],
                "pre_processing_function": {
                    "format": "text",
                    "expression": f"Unit pixels, before resizing and scaling: {rules}. scale is "
                    "reflectance per count, after the product's offset.",
                },
            }
        ],
        "mlm:output": [_output(name, ours["features"][name]) for name in OUTPUTS],
    }


def _output(name: str, width: int) -> Json:
    return {
        "name": name,
        "description": OUTPUTS[name],
        "tasks": TASKS,
        "bands": [],
        "result": {"shape": [-1, width], "dim_order": ["batch", "channel"],
                   "data_type": "float32"},
    }  # fmt: skip


def _assets(model: Artifact, folder: Path | None) -> Json:
    """Weights, config, card and manifest, each with its checksum."""
    about = {
        "weights": (MODEL, "Weights", "application/octet-stream; format=safetensors",
                    ["mlm:model", "mlm:weights"]),
        "config": (CONFIG, "Architecture and preprocessing, as timm reads it", "application/json",
                   ["metadata"]),
        "card": ("README.md", "Model card", "text/markdown", ["metadata", "overview"]),
        "manifest": (MANIFEST, "Sealed manifest: its SHA-256 is the model's digest",
                     "application/json", ["metadata"]),
    }  # fmt: skip
    assets: Json = {}
    for key, (name, title, kind, roles) in about.items():
        path = model.local(name) if folder is None else folder / name
        assets[key] = {
            "href": _address(model, name) if folder is None else f"./{name}",
            "title": title, "type": kind, "roles": roles,
            "file:checksum": f"{SHA256}{sha256_file(path)}", "file:size": path.stat().st_size,
        }  # fmt: skip
    assets["weights"]["mlm:artifact_type"] = "safetensors"
    return assets


def _address(model: Artifact, name: str) -> str:
    """Where a file of the model is in its store."""
    return model.local(name).as_uri() if model.is_local else str(model.path(name))


def training_samples(dataset: Artifact) -> gpd.GeoDataFrame:
    """Footprint and time of the samples of the training split."""
    path = dataset.local("samples.parquet")
    split = {"split"} & set(pq.read_schema(path).names)
    samples = gpd.read_parquet(path, columns=["geometry", "datetime", *split])
    return samples[samples["split"] == TRAIN] if split else samples


def time_span(samples: gpd.GeoDataFrame) -> Json:
    """Time of the first and of the last sample; always, where none states its own."""
    times = sorted(str(time) for time in samples["datetime"].dropna() if time)
    first, last = (times[0], times[-1]) if times else ALWAYS
    return {"datetime": None, "start_datetime": first, "end_datetime": last}


def cover(footprints: np.ndarray[Any, Any]) -> BaseGeometry:
    """The union of footprints (longitude, latitude), or boxes around them where it is too long.

    Args:
        footprints: [N] shapely polygons.
    """
    parts = shapely.get_parts(footprints)
    covered = shapely.union_all(parts) if len(parts) <= MOST_CORNERS else None
    for grid in GRIDS:
        if covered is not None and shapely.get_num_coordinates(covered) <= MOST_CORNERS:
            break
        bounds = shapely.bounds(parts)
        low, high = np.floor(bounds[:, :2] / grid), np.ceil(bounds[:, 2:] / grid)
        cells = np.unique(np.hstack([low, high]), axis=0) * grid
        limit = np.array([180, 90])
        low, high = np.maximum(cells[:, :2], -limit), np.minimum(cells[:, 2:], limit)
        covered = shapely.union_all(shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1]))
    polygons = [orient(part) for part in shapely.get_parts(covered)]
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def to_text(item: Json) -> str:
    """The item as it is written."""
    return json.dumps(item, indent=2, ensure_ascii=False) + "\n"
