"""Images of all supported formats become unit pixels in the requested bands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from geofm.evaluation.images import (
    ImageUnreadable,
    centre_square,
    missing_bands,
    read_task_image,
    select_bands,
)
from geofm.evaluation.tasks import TaskCard, TaskError


def write_tiff(path: Path, pixels: np.ndarray, names: list[str] | None = None) -> Path:
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width}
    with rasterio.open(path, "w", dtype=pixels.dtype, **profile) as file:
        file.write(pixels)
        for number, name in enumerate(names or []):
            file.set_band_description(number + 1, name)
    return path


def test_a_picture_is_divided_by_255(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6, 3), (255, 51, 0), dtype=np.uint8)).save(tmp_path / "a.png")
    read = read_task_image(tmp_path / "a.png", TaskCard())
    assert read.bands == ("red", "green", "blue")
    assert read.unit.shape == (3, 4, 6)
    assert read.unit[:, 0, 0] == pytest.approx([1.0, 0.2, 0.0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_pictures_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (5, 5), (80, 80, 80)).convert(mode).save(tmp_path / "a.png")
    assert read_task_image(tmp_path / "a.png", TaskCard()).unit.shape == (3, 5, 5)


def test_reflectance_is_divided_by_white(tmp_path: Path) -> None:
    pixels = np.full((2, 4, 4), 3000, dtype=np.uint16)
    path = write_tiff(tmp_path / "a.tif", pixels, ["red", "NIR"])
    read = read_task_image(path, TaskCard())
    assert read.bands == ("red", "nir")
    assert read.unit == pytest.approx(1.0)
    half = read_task_image(path, TaskCard(scale=[5e-5, 1e-4]))
    assert half.unit[:, 0, 0] == pytest.approx([0.5, 1.0])


def test_bands_without_a_name_are_asked_for(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.ones((4, 4, 4), dtype=np.uint16))
    with pytest.raises(TaskError, match=r"4 bands, but 0 name.*`bands` in task.json"):
        read_task_image(path, TaskCard())
    named = TaskCard(bands=["red", "green", "blue", "nir"])
    assert read_task_image(path, named).bands == ("red", "green", "blue", "nir")
    with pytest.raises(TaskError, match="`scale`"):
        read_task_image(path, TaskCard(bands=["a", "b", "c", "d"], scale=[1e-4]))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_damaged_file_is_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(ImageUnreadable):
        read_task_image(tmp_path / name, TaskCard(bands=["red"]))


def test_a_truncated_png_is_unreadable(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageUnreadable):
        read_task_image(tmp_path / "a.png", TaskCard())


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.ones((1, 4, 4), dtype=np.float32), ["red"])
    with pytest.raises(ImageUnreadable, match="uint8 or uint16"):
        read_task_image(path, TaskCard())


def test_bands_are_matched_by_name_and_missing_ones_filled() -> None:
    unit = np.stack([np.full((2, 2), v, dtype=np.float32) for v in (0.1, 0.2, 0.3)])
    out = select_bands(unit, ["blue", "green", "red"], ["red", "nir", "blue"], [0.9, 0.55, 0.9])
    assert out[:, 0, 0] == pytest.approx([0.3, 0.55, 0.1])
    assert missing_bands(["blue", "green", "red"], ["red", "nir", "blue"]) == ["nir"]


def test_a_square_is_cut_from_the_middle_and_resized() -> None:
    unit = np.zeros((1, 20, 60), dtype=np.float32)
    unit[:, :, 20:40] = 1.0
    assert centre_square(unit, 10).shape == (1, 10, 10)
    assert float(centre_square(unit, 10).min()) == pytest.approx(1.0)
    assert centre_square(unit, 20).shape == (1, 20, 20)
