"""Checks between the sections of a recipe that none of them can make alone."""

from __future__ import annotations

from data_catalog.errors import UsageError
from geofm.settings import Recipe


def check_budget(recipe: Recipe) -> None:
    """Refuse a number of chips to keep that is larger than the number of chips cut.

    Raises:
        UsageError: names both fields.
    """
    most, budget = recipe.cut.max_chips, recipe.curate.budget
    if most is not None and budget is not None and 1 < most < budget:
        raise UsageError(
            f"curate.budget keeps {budget:g} chips, but cut.max_chips cuts {most} at most; lower "
            "the budget, or raise cut.max_chips"
        )


def check_batch(recipe: Recipe) -> None:
    """Refuse a batch that the dataset cannot fill, whatever is found.

    Raises:
        UsageError: names the fields.
    """
    budget = recipe.curate.budget
    limits = [
        ("cut.max_chips", recipe.cut.max_chips),
        ("curate.budget", budget if budget is not None and budget > 1 else None),
    ]
    for field, most in limits:
        if most is not None and int(most) < recipe.pretrain.batch:
            raise UsageError(
                f"pretrain.batch is {recipe.pretrain.batch}, but {field} leaves {int(most)} "
                "samples at most; lower the batch, or raise the limit"
            )


def check_names(recipe: Recipe) -> None:
    """Refuse one name for the dataset and the model.

    Raises:
        UsageError: names both fields.
    """
    if recipe.model_name == recipe.pack.name:
        raise UsageError(
            f"pack.name and pretrain.name are both {recipe.pack.name!r}; a dataset and a model "
            "cannot share a name: set pretrain.name to another one"
        )
