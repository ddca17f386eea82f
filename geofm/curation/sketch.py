"""Short vectors whose products are never below those of the vectors that they stand for.

Of a unit vector x and orthonormal axes P the sketch is (P x, |x - P^T P x|), a unit vector as well.
By Cauchy and Schwarz the product of two sketches is at least that of their vectors: whatever the
axes, no pair at or above a threshold is lost when only pairs of sketches are compared. The better
the axes tell vectors apart, the fewer other pairs come with them.
"""

from __future__ import annotations

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import torch
from numpy.typing import NDArray

from geofm.threads import one_torch_thread

Units = NDArray[np.float32]

#: Numbers of a sketch: a quarter of what an ordinary embedding is to read and multiply.
WIDTH = 64
#: Vectors shorter than this many sketches are compared as they are.
WORTH = 2
#: Added to the square of the last number: more than float32 can have lost of it.
SLACK = 1e-5


def find_axes(differences: Units) -> Units:
    """The axes along which some vectors [n, d] are longest, the principal ones.

    Returns:
        [WIDTH, d], of which the last is zero: it has the place of what the others leave over.
    """
    with one_torch_thread():
        values = torch.from_numpy(differences).double()
        _, axes = torch.linalg.eigh(values.T @ values)
    found = np.zeros((WIDTH, differences.shape[1]), dtype=np.float32)
    found[:-1] = axes[:, 1 - WIDTH :].T.numpy()
    return found


def sketch(units: Units, axes: Units) -> Units:
    """Sketches [n, WIDTH] of unit vectors [n, d].

    By torch: numpy's products start threads of their own beside those of the search.
    """
    found = torch.mm(torch.from_numpy(units), torch.from_numpy(axes).T)
    rest = 1 - torch.linalg.vector_norm(found, dim=1) ** 2
    found[:, -1] = torch.sqrt(rest.clamp_(min=0).add_(SLACK))
    return np.asarray(found.numpy())
