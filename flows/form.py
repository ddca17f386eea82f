"""The fields of the forms in the Prefect UI, and the recipe that they stand for.

A form has one screen: a recipe by name, the fields that people change most, and a list of changes
for everything else. Prefect draws each plain field with its description and refuses values out of
bounds in the browser. An empty text, 0 or ``as in the recipe`` leaves the recipe's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from data_catalog.redaction import NO_SECRET
from geofm.config.recipe import NAME_PATTERN, Recipe
from geofm.config.recipe_book import load_recipe, recipe_names

AS_IN_RECIPE: Literal["as in the recipe"] = "as in the recipe"
#: Seed that leaves the recipe's; 0 is a seed of its own.
NO_SEED = -1

RecipeName = Annotated[str, Field(json_schema_extra={"enum": recipe_names()})]
Name = Annotated[str, Field(json_schema_extra={"pattern": f"{NAME_PATTERN}|^$"})]
Reference = Annotated[
    str, Field(json_schema_extra={"pattern": r"^([A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._-]+)?)?$"})
]
#: ``section.field=value``, with a value that holds no password.
CHANGE_PATTERN = r"^\s*[a-z_]+\.[a-z_]+\s*=\s*(?!\s)" + NO_SECRET.removeprefix("^")
Change = Annotated[str, Field(json_schema_extra={"pattern": CHANGE_PATTERN})]
Whole = Annotated[int, Field(ge=0, le=1_000_000)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
Seed = Annotated[int, Field(ge=NO_SEED, lt=2**31)]
Runner = Literal["as in the recipe", "threads", "processes", "dask"]
Changes = list[Change]


@dataclass(frozen=True)
class Form:
    """The values of a form that change a recipe; each default leaves the recipe's value."""

    dataset: str = ""
    max_chips: int = 0
    budget: float = 0.0
    epochs: int = 0
    batch: int = 0
    teacher: str = ""
    student: str = ""
    tasks: str = ""
    runner: str = AS_IN_RECIPE
    workers: int = 0
    seed: int = NO_SEED

    def changes(self, recipe: Recipe) -> list[str]:
        """Return the changes of a recipe that the form asks for, as ``section.field=value``."""
        given = {
            "pack.name": self.dataset,
            "cut.max_chips": self.max_chips,
            "curate.budget": self.budget,
            "pretrain.epochs": self.epochs,
            "pretrain.batch": self.batch,
            "pretrain.teacher": self.teacher,
            "pretrain.student": self.student,
            "evaluate.tasks": self.tasks,
            "compute.runner": "" if self.runner == AS_IN_RECIPE else self.runner,
            "compute.workers": self.workers,
        }
        changes = [f"{field}={value}" for field, value in given.items() if value]
        if self.seed != NO_SEED:
            changes.append(f"compute.seed={self.seed}")
        training = recipe.pretrain
        if 0 < self.epochs < training.warmup_epochs:
            # the same share of fewer epochs: else the warm-up would be longer than the training
            warmup = training.warmup_epochs * self.epochs / training.epochs
            changes.append(f"pretrain.warmup_epochs={min(warmup, self.epochs):g}")
        return changes


def recipe_of_form(name: str, form: Form, changes: Sequence[str] = ()) -> Recipe:
    """Load a recipe with the values of a form, and then with further changes.

    Args:
        name: Name of a recipe, or path of a YAML file.
        form: The values of the form.
        changes: Settings as ``section.field=value``, which come last.

    Raises:
        BadRecipe: A name, field or value is wrong; the message names it and the remedy.
    """
    return load_recipe(name, [*form.changes(load_recipe(name)), *changes])


def changed_fields(recipe: Recipe, name: str) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which a recipe differs from the one that it was loaded from.

    Returns:
        The recipe's value and the new one, by ``section.field``.
    """
    before, after = load_recipe(name).model_dump(), recipe.model_dump()
    return {
        f"{section}.{field}": (before[section][field], value)
        for section, fields in after.items()
        if isinstance(fields, dict)
        for field, value in fields.items()
        if before[section][field] != value
    }


def changes_text(recipe: Recipe, name: str) -> str:
    """Return one line about a recipe and its changes, for the log."""
    changed = changed_fields(recipe, name)
    text = ", ".join(f"{field} {new!r} (recipe: {old!r})" for field, (old, new) in changed.items())
    return f"recipe {recipe.name}: {text or 'no changes'}"
