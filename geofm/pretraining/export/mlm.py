"""A model as a STAC item of the Machine Learning Model extension (MLM 1.4).

Geometry and time of the item are those of the training samples: where and when the model has seen
the Earth.
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
from data_catalog.provenance.licences import joint_expression, source_licences
from geofm.pretraining.export.model import CONFIG, MODEL, read_model_config
from geofm.shards.split import TRAIN
from geofm.types import Json

EXTENSIONS = (
    "https://stac-extensions.github.io/mlm/v1.4.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
#: Prefix of a multihash that is a SHA-256 of 32 bytes (STAC file extension).
SHA256_PREFIX = "1220"
#: Corners that the item's geometry may have; a longer one is replaced by boxes.
MOST_CORNERS = 1000
#: Edges of the boxes in degrees, tried in this order.
BOX_EDGES = (0.01, 0.1, 1.0)
#: The extension's own time span for a model that is not bound to a time.
ALWAYS = ("1900-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
#: The extension has no task for features; comparing them is the nearest.
TASKS = ["similarity-search"]
OUTPUTS = {
    "final": "Mean over the normalised last feature map: the output of the model.",
    "distilled": "Mean over the distilled stage before any norm; of a Swin with its patch merging.",
}


def mlm_item(model: Artifact, dataset: Artifact, title: str, folder: Path | None = None) -> Json:
    """Make the STAC item of a model.

    Args:
        model: An artifact of kind ``model``.
        dataset: The dataset that it was trained on.
        title: Name of the model.
        folder: Copy of the model in which the item will lie; default: the assets are in the store.
    """
    config = read_model_config(model)
    samples = training_samples(dataset)
    geometry = covered_area(samples.geometry.to_numpy())
    licences = source_licences(model.manifest.facts)
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(EXTENSIONS),
        "id": f"{title}-{model.digest[:12]}",
        "geometry": mapping(geometry),
        "bbox": list(geometry.bounds),
        "properties": {
            **time_span(samples),
            "title": title,
            "description": f"{config['architecture']} pretrained by geofm on {len(samples)} image "
            "chips; gives features, has no classes.",
            **({"license": joint_expression(licences)} if licences else {}),
            "bands": [{"name": band} for band in config["geofm"]["bands"]],
            **_mlm_properties(model, config, title),
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


def _mlm_properties(model: Artifact, config: Json, title: str) -> Json:
    """The properties that the extension defines."""
    manifest, timm_config, geofm_config = model.manifest, config["pretrained_cfg"], config["geofm"]
    unit_rules = "; ".join(f"{kind}: {rule}" for kind, rule in geofm_config["unit"].items())
    return {
        "mlm:name": title,
        "mlm:architecture": config["architecture"],
        "mlm:tasks": TASKS,
        "mlm:framework": "pytorch",
        "mlm:framework_version": manifest.software["torch"],
        "mlm:accelerator": None,  # no particular one is needed
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
                "bands": geofm_config["bands"],
                "input": {
                    "shape": [-1, *timm_config["input_size"]],
                    "dim_order": ["batch", "bands", "height", "width"],
                    "data_type": "float32",
                },
                "resize_type": "interpolation-linear",
                "value_scaling": [
                    {"type": "z-score", "mean": mean, "stddev": std}
                    for mean, std in zip(timm_config["mean"], timm_config["std"], strict=True)
                ],
                "pre_processing_function": {
                    "format": "text",
                    "expression": f"Unit pixels, before resizing and scaling: {unit_rules}. scale "
                    "is reflectance per count, after the product's offset.",
                },
            }
        ],
        "mlm:output": [_output(name, geofm_config["features"][name]) for name in OUTPUTS],
    }


def _output(name: str, width: int) -> Json:
    return {
        "name": name,
        "description": OUTPUTS[name],
        "tasks": TASKS,
        "bands": [],
        "result": {
            "shape": [-1, width],
            "dim_order": ["batch", "channel"],
            "data_type": "float32",
        },
    }


def _assets(model: Artifact, folder: Path | None) -> Json:
    """Weights, config, card and manifest with their checksums and sizes."""
    assets = {
        "weights": {
            "file": MODEL,
            "title": "Weights",
            "type": "application/octet-stream; format=safetensors",
            "roles": ["mlm:model", "mlm:weights"],
            "mlm:artifact_type": "safetensors",
        },
        "config": {
            "file": CONFIG,
            "title": "Architecture and preprocessing, as timm reads it",
            "type": "application/json",
            "roles": ["metadata"],
        },
        "card": {
            "file": "README.md",
            "title": "Model card",
            "type": "text/markdown",
            "roles": ["metadata", "overview"],
        },
        "manifest": {
            "file": MANIFEST,
            "title": "Sealed manifest: its SHA-256 is the model's digest",
            "type": "application/json",
            "roles": ["metadata"],
        },
    }
    return {key: _located_asset(model, folder, asset) for key, asset in assets.items()}


def _located_asset(model: Artifact, folder: Path | None, asset: Json) -> Json:
    """An asset with address, checksum and size of its file."""
    name = str(asset.pop("file"))
    path = model.local(name) if folder is None else folder / name
    return {
        "href": _store_address(model, name) if folder is None else f"./{name}",
        **asset,
        "file:checksum": f"{SHA256_PREFIX}{sha256_file(path)}",
        "file:size": path.stat().st_size,
    }


def _store_address(model: Artifact, name: str) -> str:
    """Address of a file of the model in its store."""
    return model.local(name).as_uri() if model.is_local else str(model.path(name))


def training_samples(dataset: Artifact) -> gpd.GeoDataFrame:
    """Footprint and time of each sample of the training split."""
    path = dataset.local("samples.parquet")
    split = {"split"} & set(pq.read_schema(path).names)
    samples = gpd.read_parquet(path, columns=["geometry", "datetime", *split])
    return samples[samples["split"] == TRAIN] if split else samples


def time_span(samples: gpd.GeoDataFrame) -> Json:
    """Times of the first and the last sample; ``ALWAYS`` if no sample has a time."""
    times = sorted(str(time) for time in samples["datetime"].dropna() if time)
    first, last = (times[0], times[-1]) if times else ALWAYS
    return {"datetime": None, "start_datetime": first, "end_datetime": last}


def covered_area(footprints: np.ndarray[Any, Any]) -> BaseGeometry:
    """Union of footprints; boxes around them if the union has too many corners.

    Args:
        footprints: Polygons in longitude and latitude, shape (N,).
    """
    parts = shapely.get_parts(footprints)
    area = shapely.union_all(parts) if len(parts) <= MOST_CORNERS else None
    for edge in BOX_EDGES:
        if area is not None and shapely.get_num_coordinates(area) <= MOST_CORNERS:
            break
        bounds = shapely.bounds(parts)
        low, high = np.floor(bounds[:, :2] / edge), np.ceil(bounds[:, 2:] / edge)
        boxes = np.unique(np.hstack([low, high]), axis=0) * edge
        limit = np.array([180, 90])
        low, high = np.maximum(boxes[:, :2], -limit), np.minimum(boxes[:, 2:], limit)
        area = shapely.union_all(shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1]))
    polygons = [orient(part) for part in shapely.get_parts(area)]
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)


def item_json(item: Json) -> str:
    """The item as JSON text."""
    return json.dumps(item, indent=2, ensure_ascii=False) + "\n"
