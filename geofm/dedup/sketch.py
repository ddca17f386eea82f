"""Short vectors whose products are never below those of the vectors that they stand for.

Of a unit vector x and orthonormal axes P the sketch is (P x, |x - P^T P x|), a unit vector as well.
By Cauchy and Schwarz the product of two sketches is at least that of their vectors: whatever the
axes, no pair at or above a threshold is lost when only pairs of sketches are compared. The better
the axes tell vectors apart, the fewer other pairs come with them.

The axes belong to the frame, and sketches are kept with the cells: whoever compares a few vectors
with a large pool reads a quarter of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geofm.dedup.matmul import look_at_all
from geofm.embeddings.vectors import MARGIN, Space
from geofm.runtime.native import torch
from geofm.runtime.threads import one_torch_thread

Units = NDArray[np.float32]
#: Numbers of bfloat16 by their bits: numpy has no such type.
Sketches = NDArray[np.int16]

#: Numbers of a sketch: a quarter of what an ordinary embedding is to read and multiply.
WIDTH = 64
#: Vectors shorter than this many sketches are compared as they are.
WORTH = 2
#: Added to the square of the last number: more than float32 can have lost of it.
SLACK = 1e-5
#: How far rounding may move a sketch, whose length is 1: half of the worst case. The few that it
#: moves farther are made longer by four times that.
LOSES = 2.0**-9
#: How far the product of two sketches may be below that of their vectors, from ``LEAST`` on.
LOST = 2 * LOSES + LOSES**2 + MARGIN
LEAST = 0.5


def find_axes(differences: Units) -> Units:
    """The axes along which some vectors [n, d] are longest, the principal ones.

    Returns:
        [WIDTH, d], of which the last is zero: it has the place of what the others leave over.
        None, [0, d], for vectors so short that they are compared as they are.
    """
    if differences.shape[1] < WORTH * WIDTH:
        return np.empty((0, differences.shape[1]), dtype=np.float32)
    with one_torch_thread():
        values = torch.from_numpy(differences).double()
        _, axes = torch.linalg.eigh(values.T @ values)
    found = np.zeros((WIDTH, differences.shape[1]), dtype=np.float32)
    found[:-1] = axes[:, 1 - WIDTH :].T.numpy()
    return found


def sketch(units: Units, axes: Units) -> Sketches:
    """Sketches [n, WIDTH] of unit vectors [n, d].

    By torch: numpy's products start threads of their own beside those of the search.
    """
    found = torch.mm(torch.from_numpy(units), torch.from_numpy(axes).T)
    rest = 1 - torch.linalg.vector_norm(found, dim=1) ** 2
    found[:, -1] = torch.sqrt(rest.clamp_(min=0).add_(SLACK))
    rounded = found.to(torch.bfloat16)
    worst = torch.linalg.vector_norm(rounded - found, dim=1) > LOSES
    # s' = g s + e, g = 1 + 2^-7, |e| <= 2^-8 g: from s t >= 1/2 on (g - 1) s t makes up for e
    rounded[worst] = (found[worst] * (1 + 4 * LOSES)).to(torch.bfloat16)
    return np.asarray(rounded.view(torch.int16).numpy(), dtype=np.int16)


def sketch_all(space: Space, axes: Units) -> Sketches:
    """Sketches of all vectors of a space; without axes [n, 0]."""
    found = np.empty((len(space), len(axes)), dtype=np.int16)

    def keep(first: int, units: Units) -> None:
        found[first : first + len(units)] = sketch(units, axes)

    if len(axes):
        look_at_all(space, keep)
    return found
