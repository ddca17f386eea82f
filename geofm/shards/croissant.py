"""Describe a dataset in Croissant 1.1 (http://mlcommons.org/croissant/1.1).

The record sets are ``samples`` (scene, location, date and licence of each sample), ``index`` (byte
ranges in the shards) and ``pixels`` (the ``.npy`` members of the tars).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_catalog.artifact import Artifact
from data_catalog.manifest import FileEntry
from data_catalog.provenance.licences import source_licences
from geofm.formats.npy import SUFFIX
from geofm.shards.index import INDEX
from geofm.types import Json

SAMPLES = "samples.parquet"
#: JSON-LD context of Croissant 1.1.
CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
#: Type and meaning of the columns of ``samples.parquet`` that are described.
FIELDS = {
    "chip_id": ("sc:Text", "Id of the sample: its key in the shards."),
    "split": ("sc:Text", "train or holdout, drawn by ground cell."),
    "item_id": ("sc:Text", "The scene in its STAC collection."),
    "collection": ("sc:Text", "STAC collection of the scene."),
    "source": ("sc:Text", "Where the scene was found (profile of the source)."),
    "licence": ("sc:Text", "Licence of the scene."),
    "datetime": ("sc:Text", "When the scene was taken (RFC 3339)."),
    "cell": ("sc:Text", "Cell of the ground grid."),
    "crs": ("sc:Text", "Coordinate reference system of the pixels."),
    "pixel_sha256": ("sc:Text", "SHA-256 over dtype, shape and values."),
    "valid_fraction": ("sc:Float", "Share of valid pixels."),
    "cloud_fraction": ("sc:Float", "Share of cloudy pixels."),
}
#: Type and meaning of the columns of the index that are described.
INDEX_FIELDS = {
    "shard": ("sc:Text", "The tar that holds the sample."),
    "offset": ("sc:Integer", "First byte of the sample's .npy in the tar."),
    "size": ("sc:Integer", "Bytes of the .npy."),
    "sha256": ("sc:Text", "SHA-256 of the .npy."),
}


def croissant(dataset: Artifact, title: str, version: str = "", published: str = "") -> Json:
    """Describe a dataset, with the digest of every file.

    Args:
        dataset: Artifact of kind ``dataset``; paths are relative to its folder.
        title: Name of the dataset.
        version: Name of the version; if empty, the digest is used.
        published: Date of publication (ISO 8601).
    """
    manifest = dataset.manifest
    files = {entry.path: entry for entry in manifest.files}
    tars = [name for name in files if name.endswith(".tar")]
    description = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": title,
        "description": describe(dataset),
        "license": source_licences(dataset.manifest.facts),
        "creator": [{"@type": "Organization", "name": name} for name in attributions(dataset)],
        "citeAs": f"{title}, version {version or dataset.digest[:12]}, made by geofm "
        f"(SHA-256 of the manifest {dataset.digest}).",
        "version": semantic(version, dataset.digest),
        "url": f"urn:sha256:{dataset.digest}",
        "isLiveDataset": False,
        "keywords": ["remote sensing", "earth observation", "self-supervised learning"],
        "distribution": [_file(files[name]) for name in (SAMPLES, INDEX, *tars)],
        "recordSet": [
            _table("samples", SAMPLES, FIELDS, {}),
            _table("index", INDEX, {"chip_id": ("sc:Text", "The sample."), **INDEX_FIELDS},
                   {"chip_id": "samples/chip_id"}),
            _pixels(manifest.facts, dataset),
        ],
        **_coverage(dataset),
    }  # fmt: skip
    description["distribution"].append(
        {"@type": "cr:FileSet", "@id": "npy", "name": "npy", "includes": f"*{SUFFIX}",
         "description": "Pixels, bands × height × width, without the product's offset.",
         "containedIn": [{"@id": tar} for tar in tars], "encodingFormat": "application/x-npy"}
    )  # fmt: skip
    return {**description, **({"datePublished": published} if published else {})}


def semantic(version: str, digest: str) -> str:
    """Convert a version to MAJOR.MINOR.PATCH for Croissant: 2026-11-24 becomes 2026.11.24."""
    numbers = [str(int(number)) for number in re.findall("[0-9]+", version)]
    first, more = [*numbers, "0", "0", "0"][:3], numbers[3:]
    return ".".join(first) + (
        f"+{'.'.join(more)}" if more else "" if numbers else f"+{digest[:12]}"
    )


def describe(dataset: Artifact) -> str:
    """Describe the contents of a dataset in one sentence."""
    counts, facts = dataset.manifest.counts, dataset.manifest.facts
    return (
        f"{counts['rows_out']} image chips, {len(facts['bands'])} bands "
        f"({', '.join(facts['bands'])}), {facts['dtype']}, curated for self-supervised pretraining "
        "of geospatial foundation models, each with its scene, window and licence."
    )


def attributions(dataset: Artifact) -> list[str]:
    """Return the attributions that the licences require, sorted."""
    names = {str(source["attribution"]) for source in dataset.manifest.facts["sources"]}
    return sorted(names - {""}) or ["unknown"]


def _file(entry: FileEntry) -> Json:
    """Describe a file."""
    tar = entry.path.endswith(".tar")
    return {
        "@type": "cr:FileObject",
        "@id": entry.path,
        "name": entry.path,
        "contentUrl": entry.path,
        "contentSize": f"{entry.size} B",
        "encodingFormat": "application/x-tar" if tar else "application/x-parquet",
        "sha256": entry.sha256,
    }


def _table(
    name: str, file: str, fields: dict[str, tuple[str, str]], references: dict[str, str]
) -> Json:
    """Describe a table as a record set.

    Args:
        name: Name of the record set.
        file: File of the table.
        fields: Type and meaning by column.
        references: Field of another record set by column.
    """
    described: list[Json] = []
    for column, (kind, meaning) in fields.items():
        entry: Json = {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "name": f"{name}/{column}",
            "description": meaning,
            "dataType": kind,
            "source": {"fileObject": {"@id": file}, "extract": {"column": column}},
        }
        if column in references:
            entry["references"] = {"field": {"@id": references[column]}}
        described.append(entry)
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "key": {"@id": f"{name}/chip_id"},
        "field": described,
    }


def _pixels(facts: Json, dataset: Artifact) -> Json:
    """Describe the pixels as a record set."""
    shape = pq.read_table(dataset.local(SAMPLES), columns=["height", "width"]).slice(0, 1)
    height, width = (shape[name][0].as_py() for name in ("height", "width"))
    kind = {"uint8": "cr:UInt8", "uint16": "cr:UInt16"}[facts["dtype"]]
    return {
        "@type": "cr:RecordSet",
        "@id": "pixels",
        "name": "pixels",
        "field": [
            {"@type": "cr:Field", "@id": "pixels/chip_id", "name": "pixels/chip_id",
             "description": "The sample.", "dataType": "sc:Text",
             "source": {"fileSet": {"@id": "npy"}, "extract": {"fileProperty": "filename"},
                        "transform": {"regex": rf"^(.*)\{SUFFIX}$"}}},
            {"@type": "cr:Field", "@id": "pixels/pixels", "name": "pixels/pixels",
             "description": f"NumPy array of {facts['dtype']}: bands, height, width.",
             "dataType": kind, "isArray": True,
             "arrayShape": f"{len(facts['bands'])},{height},{width}",
             "source": {"fileSet": {"@id": "npy"}, "extract": {"fileProperty": "content"}}},
        ],
    }  # fmt: skip


def _coverage(dataset: Artifact) -> Json:
    """Describe area and dates as schema.org does: a box is south, west, north, east."""
    path = dataset.local(SAMPLES)
    west, south, east, north = _box(pq.read_schema(path))
    times = pc.min_max(
        pc.utf8_slice_codeunits(pq.read_table(path, columns=["datetime"])["datetime"], 0, 10)
    ).as_py()
    place = {"@type": "GeoShape", "box": f"{south:.6f} {west:.6f} {north:.6f} {east:.6f}"}
    return {
        "spatialCoverage": {"@type": "Place", "geo": place},
        **({"temporalCoverage": f"{times['min']}/{times['max']}"} if times["min"] else {}),
    }


def _box(schema: pa.Schema) -> Sequence[float]:
    """Return west, south, east and north of a GeoParquet file."""
    box: Sequence[float] = json.loads(schema.metadata[b"geo"])["columns"]["geometry"]["bbox"]
    return box
