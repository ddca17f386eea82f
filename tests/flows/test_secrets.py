"""A secret that a user types is refused with the remedy, before Prefect or a manifest keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from data_catalog.errors import UsageError
from flows.cli import main as cli
from flows.deployments import POOLS
from flows.pipeline import pretrain_flow, refresh_flow
from flows.settings import open_place
from geofm.config.recipe_book import BadRecipe, load_recipe

S = "hUsh7"


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command line in this process; returns the exit code and all it printed."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["geofm", *arguments])
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out + shown.err


@pytest.mark.parametrize("verbose", [[], ["-v"]])
@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--stac", f"https://me:{S}@api.example/v1", "${STAC_TOKEN}"),
        ("--stac", f"https://api.example/v1?token={S}", "${STAC_TOKEN}"),
        ("--set", f"search.stac=https://api.example/v1?Api-Key={S}", "${STAC_TOKEN}"),
        ("--set", f"search.stac https://me:{S}@h", "section.field=value"),
        ("--catalog", f"postgresql+psycopg://u:{S}@127.0.0.1:1/db", "GEOFM_CATALOG"),
        ("--catalog", f"postgresql+psycopg://127.0.0.1:1/db?user=u&password={S}", "GEOFM_CATALOG"),
        ("--catalog", f"postgresql+psycopg://u:a@{S}@127.0.0.1:1/db", "percent-encode"),
        ("--store", f"sftp://u:{S}@127.0.0.1/x", "FSSPEC_SFTP_PASSWORD"),
        ("--store", f"s3://AKIA:{S}@bucket/x", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_what_is_typed_is_refused_and_not_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verbose: list[str], option: str,
    value: str, remedy: str,
) -> None:  # fmt: skip
    more = [] if option == "--store" else ["--store", str(tmp_path / "store")]
    command = [*verbose, "refresh", "sentinel2-concise", *more, option, value, "--dry-run"]
    code, shown = run_cli(capsys, *command)
    assert code == 2
    assert S not in shown
    assert remedy in "".join(shown.split("\n"))


def test_a_recipe_file_with_a_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"search: {{stac: 'https://me:{S}@h/v1'}}\n")
    with pytest.raises(UsageError, match=r"search\.stac holds a secret") as found:
        load_recipe(str(path))
    assert S not in str(found.value)
    path.write_text(f"search: 'https://me:{S}@h/v1'\n")
    with pytest.raises(BadRecipe) as other:
        load_recipe(str(path))
    assert S not in str(other.value)
    path.write_text("search: {stac: 'https://${U}:${P}@h/v1?token=${T}'}\n")
    assert load_recipe(str(path)).search.stac == "https://${U}:${P}@h/v1?token=${T}"


@pytest.mark.parametrize("flow", [pretrain_flow, refresh_flow])
def test_prefect_refuses_a_secret_in_the_form_before_it_keeps_it(flow: Any) -> None:
    schema = parameter_schema(flow.fn).model_dump()

    def problems(*changes: str) -> int:
        given = {"recipe": "demo", "changes": list(changes)}
        return len(validate(given, schema, raise_on_error=False))

    assert problems("search.stac=https://${U}:${P}@h/v1?token=${T}", "pretrain.alpha=0") == 0
    assert problems(f"search.stac=https://me:{S}@h") == 1
    assert problems(f"search.stac=https://h?token={S}") == 1
    assert problems(f"search.stac =  https://me:{S}@h") == 1
    assert problems("cut.size_px=64", f"search.stac=https://me:{S}@h") == 1
    assert problems("search.bbox=2,48,3,49", "search.bbox=", "search.datetime= 2024-01-01/..") == 0
    assert problems("epochs=3") == 1


def test_no_field_of_a_form_is_an_address() -> None:
    for flow in POOLS:
        names = set(parameter_schema(flow.fn).model_dump()["properties"])
        assert not names & {"store", "catalog", "catalogue", "password", "token"}


def test_a_store_s_user_name_is_no_secret(tmp_path: Path) -> None:
    assert open_place(str(tmp_path / "me@host"), "").store.is_local


def test_a_variable_that_is_not_set_is_named_before_the_run_begins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    stac = "http://127.0.0.1:9/v1?token=${NO_SUCH_TOKEN}"
    store = ["--store", str(tmp_path / "store")]
    code, shown = run_cli(capsys, "refresh", "sentinel2-concise", *store, "--stac", stac)
    assert code == 2
    assert "${NO_SUCH_TOKEN}, which is not set" in " ".join(shown.split())
