from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from geofm.pretraining.augment import (
    CropWindow,
    crop_and_resize,
    draw_crop,
    sample_rng,
)


def _crop(images: torch.Tensor, windows: list[CropWindow], size: int) -> torch.Tensor:
    return crop_and_resize(images, torch.tensor(windows), size)


def test_a_crop_is_torchs_own_antialiased_resize_of_the_window() -> None:
    images = torch.rand(4, 3, 40, 48)
    windows = [
        CropWindow(3, 5, 30, 36, False),
        CropWindow(0, 0, 40, 48, True),
        CropWindow(7, 2, 17, 20, False),
        CropWindow(30, 40, 3, 4, True),
    ]
    ours = _crop(images, windows, 24)
    for number, window in enumerate(windows):
        cut = images[number : number + 1, :, window.top :, window.left :]
        cut = cut[..., : window.height, : window.width]
        theirs = torch.nn.functional.interpolate(
            cut, size=(24, 24), mode="bilinear", antialias=True
        )
        if window.flip:
            theirs = theirs.flip(-1)
        torch.testing.assert_close(ours[number : number + 1], theirs, atol=1e-5, rtol=1e-4)


def test_a_whole_window_of_the_same_size_changes_nothing() -> None:
    images = torch.rand(2, 4, 16, 16)
    assert torch.equal(_crop(images, [CropWindow(0, 0, 16, 16, False)] * 2, 16), images)
    flipped = _crop(images, [CropWindow(0, 0, 16, 16, True)] * 2, 16)
    assert torch.equal(flipped, images.flip(-1))


@given(st.integers(0, 2**31), st.integers(8, 300), st.integers(8, 300))
def test_windows_lie_inside_and_keep_scale_and_ratio(seed: int, height: int, width: int) -> None:
    window = draw_crop(np.random.default_rng(seed), height, width, (0.67, 1.0))
    assert 0 <= window.top <= window.top + window.height <= height
    assert 0 <= window.left <= window.left + window.width <= width
    assert window.height > 0
    assert window.width > 0
    if 0.8 < width / height < 1.25 and min(height, width) >= 64:
        share = window.height * window.width / (height * width)
        ratio = window.width / window.height
        assert 0.67 - 0.04 < share <= 1
        assert 3 / 4 - 0.03 < ratio < 4 / 3 + 0.03


def test_half_of_the_windows_are_mirrored() -> None:
    windows = [draw_crop(sample_rng(0, 0, i), 64, 64, (0.67, 1.0)) for i in range(1000)]
    assert 450 < sum(w.flip for w in windows) < 550
    assert len(set(windows)) > 900


def test_a_sample_draws_the_same_whatever_was_drawn_before() -> None:
    alone = sample_rng(1, 2, 3).random(4)
    sample_rng(1, 2, 4).random(1000)
    assert np.array_equal(sample_rng(1, 2, 3).random(4), alone)
    others = [sample_rng(*key).random() for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3))]
    assert len({alone[0], *others}) == 5
