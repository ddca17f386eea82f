"""Named recipes: find, load, change by ``section.field=value``, and refuse with a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from data_catalog.errors import UsageError
from geofm.config.recipe import RECIPES, Recipe, Section

# Checks between the sections of a recipe that none of them can make alone.


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


class BadRecipe(UsageError):
    """A recipe that does not exist or does not hold together."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with geofm."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name or YAML file, with ``section.field=value`` overrides applied.

    Raises:
        BadRecipe: unknown recipe, section or field, or a value out of bounds; says which
            and what would do.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if name not in recipe_names():
            raise BadRecipe(
                f"there is no recipe {name!r}{_nearest(name, recipe_names())}; "
                f"known: {', '.join(recipe_names())}, or give a .yaml file"
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise BadRecipe(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise BadRecipe(f"the recipe {path} is no mapping of sections; see `geofm recipes`")
    content.setdefault("name", path.stem)
    for override in overrides:
        _apply(content, override)
    try:
        return Recipe.model_validate({k: v for k, v in content.items() if v is not None})
    except ValidationError as error:
        raise BadRecipe(explain(error)) from error


def explain(error: ValidationError) -> str:
    """A validation error as one line per field: the field, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "recipe"
        given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        lines.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one ``section.field=value`` in the raw recipe."""
    place, equals, text = override.partition("=")
    section, dot, name = place.strip().partition(".")
    if not equals or not dot:
        raise BadRecipe(f"{override!r}: write section.field=value, e.g. cut.size_px=192")
    sections = {k: f.annotation for k, f in Recipe.model_fields.items()}
    model = sections.get(section)
    if not (isinstance(model, type) and issubclass(model, Section)):
        raise BadRecipe(f"there is no section {section!r}{_nearest(section, sections)}")
    field = model.model_fields.get(name)
    if field is None:
        hint = _nearest(name, model.model_fields)
        raise BadRecipe(
            f"section {section!r} has no field {name!r}{hint}; "
            f"it has {', '.join(model.model_fields)}"
        )
    try:
        value = _value(text.strip(), field.annotation)
    except yaml.YAMLError as error:
        raise BadRecipe(
            f"{place.strip()}: {text!r} is no YAML mapping, e.g. {{depth: 6}}"
        ) from error
    given = content.get(section) or {}
    if not isinstance(given, dict):
        raise BadRecipe(f"section {section!r} of the recipe is no mapping of fields")
    content[section] = {**given, name: value}


def _value(text: str, annotation: Any) -> Any:
    """A command line value: lists are comma-separated, ``none`` empties an optional field."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    if text.lower() in ("none", "null", "") and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    origin = get_origin(kind)
    if origin in (list, tuple):
        return [part.strip() for part in text.split(",") if part.strip()]
    if origin is dict:
        return yaml.safe_load(text)
    return text
