"""Unit vectors on a lattice: similarities that are whole numbers, whatever the order of the sums.

A matrix product in floating point depends in its last bits on the library, the number of threads
and the shape of the blocks, and a choice that follows such bits is not the same twice. Here each
component of a unit vector is rounded to a whole multiple of 1/4000. A product of two such vectors
is then a whole number, and all its partial sums stay below 2**24 (Cauchy-Schwarz, for up to
30,000 components), where float32 is exact: any BLAS gives the same bits. What rounding costs is
about 1e-4 of similarity, which choosing a set does not notice; what *decides* about duplicates is
``Space.similarity``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from geofm.curation.space import BLOCK, Floats, Indices, Space

Lattice = NDArray[np.float32]

#: Lattice steps per unit of length, and the whole number that stands for a similarity of 1.
STEPS = 4000
ONE = STEPS * STEPS


def to_lattice(units: Floats) -> Lattice:
    """Vectors [n, d] of length 1 (or 0) in whole lattice steps."""
    return np.rint(units * STEPS).astype(np.float32)


def lattice(space: Space, rows: Indices) -> Lattice:
    """Some rows of a space on the lattice [len(rows), d]."""
    found = np.empty((len(rows), space.stored.shape[1]), dtype=np.float32)
    for part, vectors in lattice_blocks(space, rows):
        found[part] = vectors
    return found


def lattice_blocks(space: Space, rows: Indices) -> Iterator[tuple[slice, Lattice]]:
    """The same a few thousand rows at a time, each with the positions in ``rows`` it is of."""
    for first in range(0, len(rows), BLOCK):
        part = slice(first, first + BLOCK)
        yield part, to_lattice(space.exact(rows[part]))
