"""Noise, relief and land cover: functions of world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.planet.catalog.site import Planet, make_planet
from geofm.planet.scenery.landcover import CLASSES, survey
from geofm.planet.scenery.noise import Noise, hash_ints, unit
from geofm.planet.scenery.reflectance import reflect, season_of
from geofm.planet.scenery.spectra import growth
from geofm.planet.scenery.terrain import SOUTH, WEST, cell_centres
from geofm.planet.scenes import default_plan


@pytest.fixture(scope="module")
def planet() -> Planet:
    return make_planet(7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1e5), st.floats(0, 1e5))
def test_noise_depends_on_position_alone(key: int, x: float, y: float) -> None:
    noise = Noise(3)
    alone = noise.at(key, np.array([[x]]), np.array([[y]]), 900)
    among = noise.at(key, np.array([[x + 50, x, 7.0]]), np.array([[y, y, 9.0]]), 900)
    assert alone[0, 0] == among[0, 1]


def test_hashes_fill_their_range_evenly() -> None:
    drawn = unit(hash_ints(5, np.arange(20_000), np.arange(20_000) % 7))
    assert np.histogram(drawn, 10, (0, 1))[0].min() > 1800


def test_water_runs_downhill_to_the_sea(planet: Planet) -> None:
    to = planet.relief.receiver
    at = np.arange(to.size)
    for _ in range(12):  # 4096 steps by doubling
        to = to[to]
    assert (planet.relief.height.ravel()[to] < 0).all()
    area = planet.relief.area.ravel()
    moves = planet.relief.receiver != at
    assert (area[planet.relief.receiver[moves]] >= area[moves]).all()


def test_every_class_covers_some_ground(planet: Planet) -> None:
    x, y = cell_centres(400)
    label = survey(planet, x, y, 10).label
    share = np.bincount(label.ravel(), minlength=9) / label.size
    assert share[0] == 0
    assert dict(zip(CLASSES, share[1:], strict=True)).keys() == set(CLASSES)
    assert share[1:].min() > 0.01


def test_ground_is_the_same_however_it_is_asked(planet: Planet) -> None:
    steps = np.arange(60) * 10.0 + 5
    x, y = np.meshgrid(WEST + 27_000 + steps, SOUTH + 30_000 - steps)
    whole, part = survey(planet, x, y, 10), survey(planet, x[20:, 30:], y[20:, 30:], 10)
    assert np.array_equal(whole.label[20:, 30:], part.label)
    assert np.array_equal(whole.height[20:, 30:], part.height)
    assert np.array_equal(whole.built.roof[20:, 30:], part.built.roof)


def test_sensors_agree_on_the_class(planet: Planet) -> None:
    coarse, fine = (np.arange(n) * g + g / 2 for n, g in ((64, 10.0), (256, 2.5)))
    west, north = WEST + 24_000, SOUTH + 13_000
    far = survey(planet, *np.meshgrid(west + coarse, north - coarse), 10).label
    near = survey(planet, *np.meshgrid(west + fine, north - fine), 2.5).label
    assert (near[2::4, 2::4] == far).mean() > 0.9


def test_vegetation_follows_the_season(planet: Planet) -> None:
    steps = np.arange(96) * 10.0
    x, y = np.meshgrid(WEST + 26_000 + steps, SOUTH + 8_000 - steps)
    ground = survey(planet, x, y, 10)
    green = []
    for day in (35, 150):
        values = reflect(ground, season_of(day))
        assert values.shape == (5, 96, 96) and np.isfinite(values).all()
        ndvi = (values[3] - values[2]) / (values[3] + values[2])
        green.append(np.median(ndvi))
    assert green[1] > green[0] + 0.1


@given(st.integers(0, 6), st.floats(1, 366))
def test_plants_take_no_more_than_the_field(crop: int, day: float) -> None:
    green, dry = growth(np.array([crop], dtype=np.uint8), np.array([day], dtype=np.float32))
    assert 0 <= green[0] <= 1 and 0 <= dry[0] <= 1


def test_scenes_lie_inside_the_world() -> None:
    plan = default_plan()
    for tile in (t for t in plan.tiles if t.epsg == 32631):
        west, south, east, north = tile.extent
        assert west >= WEST and south >= SOUTH and east <= WEST + 64_000 and north <= SOUTH + 48_640
