"""Small pools with a few large monotone modes, some common ones and rare ones."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from geofm.embeddings.vectors import make_space
from geofm.selection.methods import Candidates


def skewed_pool(seed: int = 2, width: int = 24) -> tuple[Candidates, NDArray[np.int64]]:
    """600 chips, sorted by id, and their modes: 0 and 1 monotone, 2 to 11 common, 12 to 15 rare."""
    draw = np.random.default_rng(seed)
    sizes = np.array([300, 200, *[8] * 10, *[5] * 4])
    modes = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = draw.normal(size=(len(sizes), width)) * 2
    spread = np.where(modes < 2, 0.3, 0.6)[:, None]
    vectors = (centres[modes] + spread * draw.normal(size=(len(modes), width))).astype(np.float16)
    ids = sorted(hashlib.sha256(f"{seed} {n}".encode()).hexdigest()[:24] for n in range(len(modes)))
    tiles = [f"tile {mode % 3} {n % 2}" for n, mode in enumerate(modes)]
    entropy = np.round(draw.uniform(2, 8, len(modes)), 3)
    space = make_space(vectors)
    return Candidates(space, np.arange(len(modes)), ids, entropy, tiles), modes
