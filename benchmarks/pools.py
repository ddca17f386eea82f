"""Vectors for the benchmarks of curation: heavy-tailed clusters with planted pairs.

Clusters have Pareto sizes, and their members have similarities of 0.3 to 0.7. A fifth of the
vectors is in no cluster. A tenth of the vectors is planted near an original at cosines spread
evenly over 0.95 to 1, and one in a hundred at 0.94 to 0.95, each moved in a random direction. (A
move towards another vector of the pool crosses more borders of cells, and more pairs are missed.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK = 100_000


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def make_pool(
    rows: int, seed: int, path: Path, width: int = 256
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write float16 vectors of shape (rows, width) to a .npy file; return the planted pairs."""
    draw = np.random.default_rng(seed)
    planted, border = rows // 10, rows // 100
    base = rows - planted - border
    single = base // 5
    sizes = np.minimum(np.ceil(4 * (1 + draw.pareto(1.1, base // 8))), base // 100).astype(np.int64)
    ends = np.cumsum(sizes)
    count = int(np.searchsorted(ends, base - single)) + 1
    label = np.repeat(np.arange(count), sizes[:count])[: base - single]
    centres = _unit(draw.normal(size=(count, width)).astype(np.float32))
    spread = draw.uniform(0.65, 1.5, count).astype(np.float32)
    label = np.concatenate([label, np.full(base - len(label), -1)])
    out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    place = draw.permutation(rows)  # position of each vector, in random order
    for first in range(0, base, BLOCK):
        mine = label[first : min(first + BLOCK, base)]
        noise = draw.normal(size=(len(mine), width)).astype(np.float32) / np.float32(width**0.5)
        member = mine >= 0
        noise[member] = noise[member] * spread[mine[member], None] + centres[mine[member]]
        out[place[first : first + len(mine)]] = _unit(noise)
    of = np.concatenate([draw.permutation(base)[:planted], draw.integers(0, base, border)])
    wanted = np.concatenate(
        [np.linspace(0.95, 1, planted, endpoint=False), np.linspace(0.94, 0.95, border)]
    )
    for first in range(0, len(of), BLOCK):
        part = of[first : first + BLOCK]
        x = _unit(out[place[part]].astype(np.float32))
        away = draw.normal(size=x.shape).astype(np.float32)
        towards = np.flatnonzero(draw.random(len(part)) < 0.0)
        away[towards] = out[place[draw.integers(0, base, len(towards))]]
        away -= np.einsum("ij,ij->i", away, x)[:, None] * x
        cosine = wanted[first : first + len(part), None].astype(np.float32)
        new = cosine * x + np.sqrt(1 - cosine**2) * _unit(away)
        out[place[base + first : base + first + len(part)]] = new
    out.flush()
    return place[of], place[base:]
