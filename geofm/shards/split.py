"""Draw the holdout by ground cell, so that no ground is in both train and holdout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

TRAIN, HOLDOUT, RIM = "train", "holdout", "rim"
#: Share of the smaller footprint below which two footprints only touch, by rounded corners.
TOUCHES = 0.01


def is_held_out(cell: str, share: float, seed: int) -> bool:
    """Return whether a ground cell is held out: by a hash, so independently of other cells."""
    drawn = int.from_bytes(hashlib.sha256(f"holdout {seed} {cell}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def split_cells(
    cells: Sequence[str], footprints: Sequence[bytes], share: float, seed: int
) -> dict[str, str]:
    """Assign each ground cell to a split.

    All chips of a cell are in one split, whatever their date or sensor. Cells of different grids
    (another UTM zone, chip size or pixel size) may overlap: a cell that would train but overlaps a
    held-out cell is ``rim`` and belongs to neither split.

    Args:
        cells: Distinct names of cells: grid, ``/``, x, ``/``, y.
        footprints: WKB of each cell, degrees.
        share: Share of the cells that is held out, 0 to 1.
        seed: Seed of the draw.

    Returns:
        ``train``, ``holdout`` or ``rim`` by cell.
    """
    split = {c: HOLDOUT if share > 0 and is_held_out(c, share, seed) else TRAIN for c in cells}
    grids = np.array([cell.rsplit("/", 2)[0] for cell in cells], dtype=object)
    held = np.array([split[cell] == HOLDOUT for cell in cells], dtype=np.bool_)
    if not held.any() or len(set(grids)) == 1:  # cells of one grid do not overlap
        return split
    areas = shapely.from_wkb(np.array(footprints, dtype=object))
    for number in _overlapped(areas, grids, held):
        split[cells[number]] = RIM
    return split


def _overlapped(
    areas: NDArray[np.object_], grids: NDArray[np.object_], held: NDArray[np.bool_]
) -> list[int]:
    """Return the training areas that overlap a held-out area of another grid."""
    inside, outside = np.flatnonzero(held), np.flatnonzero(~held)
    pairs = shapely.STRtree(areas[outside]).query(areas[inside], predicate="intersects")
    held_out, other = inside[pairs[0]], outside[pairs[1]]
    different = grids[held_out] != grids[other]
    held_out, other = held_out[different], other[different]
    shared = shapely.area(shapely.intersection(areas[held_out], areas[other]))
    smaller = np.minimum(shapely.area(areas[held_out]), shapely.area(areas[other]))
    return [int(number) for number in np.unique(other[shared > TOUCHES * smaller])]
