"""The embedded default: a small procedural Earth as COGs behind a real STAC API on loopback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def labelled_folder(
    root: Path, bands: Sequence[str], size_px: int = 64, per_class: int = 60, seed: int = 7
) -> Path:
    """The evaluation task ``planet``; see :func:`geofm.planet.labelled.labelled_folder`."""
    # raster libraries are loaded only where somebody asks for pixels
    from geofm.planet import labelled

    return labelled.labelled_folder(root, bands, size_px, per_class, seed)
