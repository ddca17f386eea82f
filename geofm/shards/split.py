"""Train and holdout: cells of ground are drawn, never chips, and no ground is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

TRAIN, HOLDOUT, RIM = "train", "holdout", "rim"
#: Footprints of two lattices that share less of the smaller one only touch (rounding of corners).
TOUCHES = 0.01


def is_held_out(cell: str, share: float, seed: int) -> bool:
    """Whether a ground cell belongs to the holdout: by a hash, so other cells play no part."""
    drawn = int.from_bytes(hashlib.sha256(f"holdout {seed} {cell}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def split_cells(
    cells: Sequence[str], footprints: Sequence[bytes], share: float, seed: int
) -> dict[str, str]:
    """``train``, ``holdout`` or ``rim`` by cell.

    All chips of a cell are on one side, whatever their date or sensor. Cells of different
    lattices (other UTM zone, chip size or pixel size) may lie on the same ground: one that
    would train but overlaps a held-out cell is ``rim`` and belongs to neither.

    Args:
        cells: different names of cells: lattice, ``/``, x, ``/``, y.
        footprints: WKB of each, degrees.
        share: of the cells that is held out, 0 to 1.
        seed: of the draw.
    """
    split = {c: HOLDOUT if share > 0 and is_held_out(c, share, seed) else TRAIN for c in cells}
    lattices = np.array([cell.rsplit("/", 2)[0] for cell in cells], dtype=object)
    held = np.array([split[cell] == HOLDOUT for cell in cells], dtype=np.bool_)
    if not held.any() or len(set(lattices)) == 1:  # cells of one lattice do not overlap
        return split
    areas = shapely.from_wkb(np.array(footprints, dtype=object))
    for number in _overlapped(areas, lattices, held):
        split[cells[number]] = RIM
    return split


def _overlapped(
    areas: NDArray[np.object_], lattices: NDArray[np.object_], held: NDArray[np.bool_]
) -> list[int]:
    """Numbers of the areas not held out that share ground with one of another lattice that is."""
    inside, outside = np.flatnonzero(held), np.flatnonzero(~held)
    found = shapely.STRtree(areas[outside]).query(areas[inside], predicate="intersects")
    mine, other = inside[found[0]], outside[found[1]]
    apart = lattices[mine] != lattices[other]
    mine, other = mine[apart], other[apart]
    shared = shapely.area(shapely.intersection(areas[mine], areas[other]))
    smaller = np.minimum(shapely.area(areas[mine]), shapely.area(areas[other]))
    return [int(number) for number in np.unique(other[shared > TOUCHES * smaller])]
