from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geofm.config.recipe import PretrainSettings
from geofm.pretraining.masking import draw_mask, masked_patches, upsample_mask


def test_22_of_36_patches_at_192_pixels() -> None:
    settings = PretrainSettings()
    grid = settings.size_px // settings.mask_patch_px
    assert (settings.size_px, grid) == (192, 6)
    mask = draw_mask(np.random.default_rng(0), grid, settings.mask_ratio)
    assert mask.shape == (6, 6)
    assert mask.sum() == 22


def test_rounding_errors_mask_no_patch_more() -> None:
    assert masked_patches(10, 0.7) == 7  # 10 * 0.7 is 7.000000000000001 on some paths
    assert masked_patches(100, 0.55) == 55  # 100 * 0.55 is 55.00000000000001


@given(st.integers(1, 24), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_every_mask_hides_the_same_number(grid: int, ratio: float, seed: int) -> None:
    mask = draw_mask(np.random.default_rng(seed), grid, ratio)
    hidden = int(mask.sum())
    assert hidden == masked_patches(grid * grid, ratio)
    assert hidden - 1 < ratio * grid * grid <= hidden + 1e-6


def test_masks_differ_and_cover_all_places() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([draw_mask(rng, 6, 0.6) for _ in range(400)])
    assert len(np.unique(masks.reshape(400, -1), axis=0)) == 400
    share = masks.mean(axis=0)
    assert share.min() > 0.5
    assert share.max() < 0.72


def test_spreading_repeats_each_patch_as_a_block() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    fine = upsample_mask(mask, 6)
    expected = np.kron(mask.numpy(), np.ones((1, 3, 3), dtype=bool))
    assert torch.equal(fine, torch.from_numpy(expected))
    with pytest.raises(ValueError, match="cannot be spread"):
        upsample_mask(mask, 5)
