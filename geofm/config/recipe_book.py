"""The recipe book: load a recipe by name or file, apply overrides, and explain mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from data_catalog.errors import UsageError
from geofm.config.recipe import Recipe, RecipeSection

#: Folder of the recipes that come with geofm.
RECIPES = Path(__file__).parent / "recipes"


class BadRecipe(UsageError):
    """A recipe does not exist or is invalid."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with geofm."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe and apply overrides.

    Args:
        name: Name of a recipe of geofm, or path of a YAML file.
        overrides: Settings as ``section.field=value``.

    Raises:
        BadRecipe: A recipe, section or field is unknown, or a value is out of bounds; the message
            names it and the remedy.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if name not in recipe_names():
            raise BadRecipe(
                f"there is no recipe {name!r}{_suggestion(name, recipe_names())}; "
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


def _apply(content: dict[str, Any], override: str) -> None:
    """Set a ``section.field=value`` in the raw recipe."""
    path, equals, text = override.partition("=")
    section, dot, name = path.strip().partition(".")
    if not equals or not dot:
        raise BadRecipe(f"{override!r}: write section.field=value, e.g. cut.size_px=192")
    sections = {k: f.annotation for k, f in Recipe.model_fields.items()}
    model = sections.get(section)
    if not (isinstance(model, type) and issubclass(model, RecipeSection)):
        raise BadRecipe(f"there is no section {section!r}{_suggestion(section, sections)}")
    field = model.model_fields.get(name)
    if field is None:
        hint = _suggestion(name, model.model_fields)
        raise BadRecipe(
            f"section {section!r} has no field {name!r}{hint}; "
            f"it has {', '.join(model.model_fields)}"
        )
    try:
        value = _parse_value(text.strip(), field.annotation)
    except yaml.YAMLError as error:
        raise BadRecipe(
            f"{path.strip()}: {text!r} is no YAML mapping, e.g. {{depth: 6}}"
        ) from error
    fields = content.get(section) or {}
    if not isinstance(fields, dict):
        raise BadRecipe(f"section {section!r} of the recipe is no mapping of fields")
    content[section] = {**fields, name: value}


def _parse_value(text: str, annotation: Any) -> Any:
    """Parse a value of the command line: lists by commas; ``none`` empties an optional field."""
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


def explain(error: ValidationError) -> str:
    """Write a validation error as text: each field, its fault and its value."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "recipe"
        value = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        lines.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(lines)


def _suggestion(word: str, known: Iterable[str]) -> str:
    """Return a "did you mean" for a misspelt word; empty if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Checks across sections, before a run starts (flows/preflight.py).


def check_budget(recipe: Recipe) -> None:
    """Refuse a budget of chips that is larger than the number of chips cut.

    Raises:
        UsageError: Names both fields.
    """
    max_chips, budget = recipe.cut.max_chips, recipe.curate.budget
    if max_chips is not None and budget is not None and 1 < max_chips < budget:
        raise UsageError(
            f"curate.budget keeps {budget:g} chips, but cut.max_chips cuts {max_chips} at most; "
            "lower the budget, or raise cut.max_chips"
        )


def check_batch(recipe: Recipe) -> None:
    """Refuse a batch that is larger than any dataset of the recipe.

    Raises:
        UsageError: Names the fields.
    """
    budget = recipe.curate.budget
    limits = [
        ("cut.max_chips", recipe.cut.max_chips),
        ("curate.budget", budget if budget is not None and budget > 1 else None),
    ]
    for field, limit in limits:
        if limit is not None and int(limit) < recipe.pretrain.batch:
            raise UsageError(
                f"pretrain.batch is {recipe.pretrain.batch}, but {field} leaves {int(limit)} "
                "samples at most; lower the batch, or raise the limit"
            )


def check_names(recipe: Recipe) -> None:
    """Refuse the same name for dataset and model.

    Raises:
        UsageError: Names both fields.
    """
    if recipe.model_name == recipe.pack.name:
        raise UsageError(
            f"pack.name and pretrain.name are both {recipe.pack.name!r}; a dataset and a model "
            "cannot share a name: set pretrain.name to another one"
        )
