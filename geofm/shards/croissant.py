"""A dataset in Croissant 1.1 (http://mlcommons.org/croissant/1.1): what any tool can load.

Record sets: ``samples`` (who, where, when, licence), ``index`` (which bytes of which shard) and
``pixels`` (the ``.npy`` members of the tars).
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
from geofm.shards.index import INDEX
from geofm.types import Json

SAMPLES = "samples.parquet"

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
#: Columns of ``samples.parquet`` that are described: type and meaning.
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
PLACES = {
    "shard": ("sc:Text", "The tar that holds the sample."),
    "offset": ("sc:Integer", "First byte of the sample's .npy in the tar."),
    "size": ("sc:Integer", "Bytes of the .npy."),
    "sha256": ("sc:Text", "SHA-256 of the .npy."),
}


def croissant(dataset: Artifact, title: str, version: str = "", published: str = "") -> Json:
    """The description of a dataset, with the digest of every file.

    Args:
        dataset: an artifact of kind ``dataset``; paths are relative to its folder.
        title: its name.
        version: name of the version; the digest when empty.
        published: ISO date.
    """
    manifest = dataset.manifest
    files = {entry.path: entry for entry in manifest.files}
    tars = [name for name in files if name.endswith(".tar")]
    about = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": title,
        "description": describe(dataset),
        "license": source_licences(dataset.manifest.facts),
        "creator": [{"@type": "Organization", "name": who} for who in attributions(dataset)],
        "citeAs": f"{title}, version {version or dataset.digest[:12]}, made by geofm "
        f"(SHA-256 of the manifest {dataset.digest}).",
        "version": semantic(version, dataset.digest),
        "url": f"urn:sha256:{dataset.digest}",
        "isLiveDataset": False,
        "keywords": ["remote sensing", "earth observation", "self-supervised learning"],
        "distribution": [_file(files[name]) for name in (SAMPLES, INDEX, *tars)],
        "recordSet": [
            _table("samples", SAMPLES, FIELDS, {}),
            _table("index", INDEX, {"chip_id": ("sc:Text", "The sample."), **PLACES},
                   {"chip_id": "samples/chip_id"}),
            _pixels(manifest.facts, dataset),
        ],
        **_coverage(dataset),
    }  # fmt: skip
    about["distribution"].append(
        {"@type": "cr:FileSet", "@id": "npy", "name": "npy", "includes": "*.npy",
         "description": "Pixels, bands × height × width, without the product's offset.",
         "containedIn": [{"@id": tar} for tar in tars], "encodingFormat": "application/x-npy"}
    )  # fmt: skip
    return {**about, **({"datePublished": published} if published else {})}


def semantic(version: str, digest: str) -> str:
    """A version as MAJOR.MINOR.PATCH, which Croissant asks for: 2026-11-24 is 2026.11.24."""
    numbers = [str(int(number)) for number in re.findall("[0-9]+", version)]
    first, more = [*numbers, "0", "0", "0"][:3], numbers[3:]
    return ".".join(first) + (
        f"+{'.'.join(more)}" if more else "" if numbers else f"+{digest[:12]}"
    )


def describe(dataset: Artifact) -> str:
    """One sentence on what it is."""
    counts, facts = dataset.manifest.counts, dataset.manifest.facts
    return (
        f"{counts['rows_out']} image chips, {len(facts['bands'])} bands "
        f"({', '.join(facts['bands'])}), {facts['dtype']}, curated for self-supervised pretraining "
        "of geospatial foundation models, each with its scene, window and licence."
    )


def attributions(dataset: Artifact) -> list[str]:
    """Who has to be named, sorted."""
    said = {str(source["attribution"]) for source in dataset.manifest.facts["sources"]}
    return sorted(said - {""}) or ["unknown"]


def _file(entry: FileEntry) -> Json:
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
    described: list[Json] = []
    for column, (kind, meaning) in fields.items():
        one = {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "name": f"{name}/{column}",
            "description": meaning,
            "dataType": kind,
            "source": {"fileObject": {"@id": file}, "extract": {"column": column}},
        }
        if column in references:
            one["references"] = {"field": {"@id": references[column]}}
        described.append(one)
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "key": {"@id": f"{name}/chip_id"},
        "field": described,
    }


def _pixels(facts: Json, dataset: Artifact) -> Json:
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
                        "transform": {"regex": r"^(.*)\.npy$"}}},
            {"@type": "cr:Field", "@id": "pixels/pixels", "name": "pixels/pixels",
             "description": f"NumPy array of {facts['dtype']}: bands, height, width.",
             "dataType": kind, "isArray": True,
             "arrayShape": f"{len(facts['bands'])},{height},{width}",
             "source": {"fileSet": {"@id": "npy"}, "extract": {"fileProperty": "content"}}},
        ],
    }  # fmt: skip


def _coverage(dataset: Artifact) -> Json:
    """Where and when, as schema.org has it: box as south west north east."""
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
    """West, south, east, north of a GeoParquet file."""
    box: Sequence[float] = json.loads(schema.metadata[b"geo"])["columns"]["geometry"]["bbox"]
    return box
