"""Recipes that come with geofm hold together, down to the networks they name."""

from __future__ import annotations

import pytest
import torch

from geofm.config.recipe_book import load_recipe, recipe_names
from geofm.embeddings.encoders import LITE0, check_model_name
from geofm.pretraining.loop import check_microbatches
from geofm.pretraining.masking import masked_patches
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.optimiser import make_schedule


@pytest.mark.parametrize("name", recipe_names())
def test_its_student_can_be_built_and_takes_a_step(name: str) -> None:
    recipe = load_recipe(name)
    settings, bands = recipe.pretrain, len(recipe.cut.bands)
    if settings.teacher != LITE0:
        check_model_name(settings.teacher)
    module = build_pretrainer(settings, bands, 0, 64)
    for processes in (1, 2, 8):
        check_microbatches(module, settings, processes)
    grid = settings.size_px // settings.mask_patch_px
    mask = torch.zeros(1, grid * grid, dtype=torch.bool)
    mask[:, module.student.visible_patches :] = True
    images = torch.randn(1, bands, settings.size_px, settings.size_px)
    with torch.no_grad():
        losses = module(images, mask.reshape(1, grid, grid), torch.randn(1, 64))
    assert losses.mim is not None
    assert losses.loss.isfinite()


def test_gfm_swin_b_has_the_papers_figures() -> None:
    settings = load_recipe("gfm-swin-b").pretrain
    plan = make_schedule(settings, 587_954 // settings.batch)
    assert (plan.steps, plan.peak) == (57_400, pytest.approx(4e-4))
    grid = settings.size_px // settings.mask_patch_px
    assert (grid * grid, masked_patches(grid * grid, settings.mask_ratio)) == (36, 22)
    fast = load_recipe("gfm-swin-b-fast").pretrain
    assert fast.model_copy(update={"compile": False}) == settings
