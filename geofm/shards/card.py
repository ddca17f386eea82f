"""The card of a dataset: contents, licences, reading and origin, on one page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data_catalog.artifact import Artifact
from data_catalog.hashing import digest_of
from geofm.shards.sample_metadata import Samples
from geofm.shards.split import HOLDOUT

CARD = """# {name}

{samples} image chips of {height} × {width} pixels, {band_count} bands ({bands}), {dtype}, for
self-supervised pretraining. Made by geofm.

| | |
|---|---|
| samples | {samples} from {items} scenes of {collections} |
| splits | {splits} |
| ground sample distance | {gsd} |
| area (west, south, east, north) | {box} |
| dates | {dates} |
| mean per band (unit space) | {mean} |
| standard deviation per band | {std} |

*Unit space* is reflectance divided by {white} for 16-bit data (count × scale / {white}) and
count / 255 for 8-bit data.

## Licences

Using this dataset means keeping to every one of these:

| licence | source | samples | attribution |
|---|---|---|---|
{licences}

## How to read it

Plain WebDataset tars: per sample `KEY.npy` (pixels, bands × height × width, offset of the
product already applied) and `KEY.json` (scene, assets and their digests, window, CRS, transform,
footprint, time, licence). KEY is the chip's id.

```python
import webdataset as wds

for sample in wds.WebDataset("shards/{name}-train-00000.tar", shardshuffle=False).decode():
    pixels, about = sample["npy"], sample["json"]
```

or with `tar -xf shards/{name}-train-00000.tar`. `index.parquet` has the byte range and SHA-256 of
every member, `samples.parquet` (GeoParquet) everything about every sample, `stats.json` the
numbers above.

## How it was made

| stage | version | settings | artifact |
|---|---|---|---|
{stages}

{made}
"""


def write_card(
    path: Path,
    name: str,
    samples: Samples,
    stats: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
) -> None:
    """Write the card of a dataset from its samples, statistics and inputs."""
    first = next(samples.records(0, 1))
    days = sorted({time[:10] for time in samples.distinct("datetime") if time})
    box = ", ".join(f"{degree:.4f}" for degree in samples.bounds())
    text = CARD.format(
        name=name,
        samples=len(samples),
        splits=_splits(samples),
        height=int(first["height"]),
        width=int(first["width"]),
        band_count=len(stats["bands"]),
        bands=", ".join(stats["bands"]),
        dtype=stats["dtype"],
        items=len(samples.distinct("item_id")),
        collections=", ".join(sorted(samples.distinct("collection"))),
        gsd=_gsd(samples),
        box=f"{box} (EPSG:4326)",
        dates=f"{days[0]} to {days[-1]}" if days else "unknown",
        mean=", ".join(f"{value:.4f}" for value in stats["mean"]),
        std=", ".join(f"{value:.4f}" for value in stats["std"]),
        white=stats["white"],
        licences="\n".join(
            f"| {s['licence']} | {s['source']} | {s['rows']} | {_cell(s['attribution'])} |"
            for s in sources
        ),
        stages="\n".join(_stage(role, artifact) for role, artifact in inputs.items()),
        made=_made(inputs["decisions"]),
    )
    path.write_text(text, encoding="utf-8")


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _splits(samples: Samples) -> str:
    """Describe the number of samples of each split."""
    phrases = [f"{last - first} {split}" for split, (first, last) in samples.splits.items()]
    if HOLDOUT in samples.splits:
        phrases.append("drawn by ground cell, no ground is in both")
    return "; ".join([", ".join(phrases[:2]), *phrases[2:]])


def _gsd(samples: Samples) -> str:
    """Give the smallest and largest pixel size in units of the chips' CRS."""
    widths = {s for b in samples.batches() for s in pc.list_element(b["transform"], 0).to_pylist()}
    sizes = np.abs(sorted(widths))
    low, high = f"{sizes.min():.6g}", f"{sizes.max():.6g}"
    unit = "m" if sizes.min() > 0.05 else "degrees"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _stage(role: str, artifact: Artifact) -> str:
    """Make the table row of an input."""
    manifest = artifact.manifest
    settings = digest_of(manifest.settings)[:12]
    return f"| {manifest.stage} | {manifest.version} | `{settings}` | {role} `{artifact.digest}` |"


def _made(decisions: Artifact) -> str:
    """Count the candidates and the reasons for which chips were dropped."""
    manifest = decisions.manifest
    counts = manifest.counts
    dropped = ", ".join(f"{count} by {rule}" for rule, count in sorted(manifest.dropped.items()))
    return (
        f"Of {counts['rows_in']} candidate chips {counts['rows_out']} were kept"
        f"{f'; dropped: {dropped}' if dropped else ''}. Each decision, with its reason and "
        "witness, is in `decisions.parquet` of that artifact."
    )
