"""Smooth fields of the world on the grid of the relief.

Most properties that shape the land vary slowly. They are sampled once per cell of 100 m and
interpolated together, which is many times faster than evaluating each at every point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from geofm.planet.scenery.noise import Noise
from geofm.planet.scenery.terrain import CELL, SOUTH, WEST, Relief, cell_centres
from geofm.types import Floats, Floats32

#: Noise fields: key, longest wavelength in metres, roughness.
NOISES = {
    "broad": (41, 5200, 1.7),
    "patch": (42, 1500, 1.5),
    "erg": (44, 7000, 2.2),
    "dune": (45, 2600, 2.1),
    "bend_x": (46, 2600, 2.4),
    "bend_y": (47, 2600, 2.4),
    "pasture": (49, 11_000, 2.2),
    "stand": (54, 4300, 1.5),
    "conifer": (55, 1800, 1.3),
    "pull": (60, 2600, 1.6),
    "street_x": (61, 1500, 2.2),
    "street_y": (62, 1500, 2.2),
}
NAMES = (*NOISES, "steep", "lake")


@dataclass(frozen=True)
class Fields:
    """Values on the grid, shape (len(NAMES), rows * columns), row 0 in the south."""

    values: Floats32
    rows: int
    columns: int

    def at(self, x: Floats, y: Floats) -> dict[str, Floats32]:
        """Interpolate all fields linearly at points, shape (H, W)."""
        u, v = (x - WEST) / CELL - 0.5, (y - SOUTH) / CELL - 0.5
        np.clip(u, 0, self.columns - 1.001, out=u)
        np.clip(v, 0, self.rows - 1.001, out=v)
        left, low = u.astype(np.int32), v.astype(np.int32)
        fu, fv = (u - left).astype(np.float32), (v - low).astype(np.float32)
        corner = left + low * np.int32(self.columns)
        values = np.zeros((len(NAMES), *x.shape), dtype=np.float32)
        for step, weight in (
            (0, (1 - fu) * (1 - fv)), (1, fu * (1 - fv)),
            (self.columns, (1 - fu) * fv), (self.columns + 1, fu * fv),
        ):  # fmt: skip
            index = corner + np.int32(step)
            for number in range(len(NAMES)):
                values[number] += weight * self.values[number].take(index)
        return dict(zip(NAMES, values, strict=True))


def make_fields(noise: Noise, relief: Relief) -> Fields:
    """Sample the fields of a world."""
    x, y = cell_centres()
    gy, gx = np.gradient(ndimage.gaussian_filter(relief.height, 1.2), CELL)
    layers = [noise.at(key, x, y, wave, power) for key, wave, power in NOISES.values()]
    layers += [np.hypot(gx, gy).astype(np.float32), relief.lake]
    rows, columns = relief.height.shape
    return Fields(np.stack([layer.ravel() for layer in layers]), rows, columns)
