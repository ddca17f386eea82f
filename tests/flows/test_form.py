"""The fields of a form, and the recipe that they stand for."""

from __future__ import annotations

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.deployments import POOLS
from flows.form import Form, changed_fields, changes_text, recipe_of_form
from flows.gpu import CPU_POOL
from flows.pipeline import pretrain_flow, refresh_flow
from flows.run_name import is_generated, name_of
from geofm.config.recipe_book import BadRecipe, load_recipe


def test_an_empty_form_is_the_recipe() -> None:
    assert recipe_of_form("demo", Form()) == load_recipe("demo")
    assert changes_text(recipe_of_form("demo", Form()), "demo") == "recipe demo: no changes"


def test_each_field_changes_what_it_names_and_nothing_else() -> None:
    form = Form(
        dataset="mine", max_chips=9, budget=0.5, epochs=60, batch=32, teacher="resnet18",
        student="vit_small_patch16_224", tasks="planet, /data/aid", runner="processes", workers=3,
        seed=0,
    )  # fmt: skip
    changed = changed_fields(recipe_of_form("demo", form), "demo")
    assert {field: new for field, (_, new) in changed.items()} == {
        "pack.name": "mine", "cut.max_chips": 9, "curate.budget": 0.5,
        "pretrain.epochs": 60, "pretrain.batch": 32, "pretrain.teacher": "resnet18",
        "pretrain.student": "vit_small_patch16_224", "evaluate.tasks": ["planet", "/data/aid"],
        "compute.runner": "processes", "compute.workers": 3,
    }  # fmt: skip
    made = recipe_of_form("demo", Form(seed=7), ["compute.seed=8"])
    assert made.compute.seed == 8, "changes come last"


def test_fewer_epochs_have_a_shorter_warm_up() -> None:
    """With the demo's own warm-up of more than an epoch, one epoch would be refused."""
    demo = load_recipe("demo").pretrain
    assert demo.warmup_epochs > 1
    made = recipe_of_form("demo", Form(epochs=1)).pretrain
    assert made.epochs == 1
    assert made.warmup_epochs == pytest.approx(demo.warmup_epochs / demo.epochs, rel=1e-5)
    assert recipe_of_form("demo", Form(epochs=demo.epochs)).pretrain == demo


def test_a_wrong_change_names_the_field() -> None:
    with pytest.raises(BadRecipe, match="did you mean 'size_px'"):
        recipe_of_form("demo", Form(), ["cut.size=3"])


def test_the_browser_refuses_values_out_of_bounds() -> None:
    schema = parameter_schema(pretrain_flow.fn).model_dump()
    good = {"recipe": "demo", "dataset": "demo@2026-11-30", "epochs": 4, "changes": ["a.b=c"]}
    assert validate(good, schema, raise_on_error=False) == []
    for wrong in (
        {"epochs": -1}, {"budget": -0.1}, {"recipe": "dmo"}, {"dataset": "a b"}, {"batch": 10**6},
        {"runner": "ray"}, {"workers": -1}, {"seed": -2}, {"changes": ["epochs=1"]},
    ):  # fmt: skip
        assert len(validate({**good, **wrong}, schema, raise_on_error=False)) == 1, wrong
    refresh = parameter_schema(refresh_flow.fn).model_dump()
    assert validate({"dataset": "Not A Name"}, refresh, raise_on_error=False)


def test_a_form_has_one_screen_of_plain_fields() -> None:
    for flow in (flow for flow, pool in POOLS.items() if pool == CPU_POOL):
        fields = parameter_schema(flow.fn).model_dump()["properties"]
        assert len(fields) <= 13
        for name, field in fields.items():
            assert field.get("description"), (flow.name, name)
            assert field["type"] in ("string", "integer", "number", "boolean", "array")


def test_a_run_is_named_for_what_it_does() -> None:
    recipe = load_recipe("demo", ["pretrain.epochs=4", "pretrain.alpha=0"])
    assert name_of(recipe, "352 chips", training=True) == "demo · 4 epochs · α=0 · 352 chips"
    assert name_of(recipe, training=False) == "demo"
    assert is_generated("amber-otter")
    assert is_generated("Fantastic-Zebu")
    assert is_generated("omega23-algedi-instability")
    for typed in ("my night", "Demo-run", "night-2", "demo", "a-b-c", "eta-2-b", "beta-my-run"):
        assert not is_generated(typed)
