"""The pipeline as a user runs it: whole, again, audited, misused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from tests.flows.conftest import SMALL, Outcome
from tests.flows.test_imports import NETWORKS, imported_by

pytestmark = pytest.mark.slow
Geofm = Callable[..., Outcome]


@pytest.fixture(scope="session")
def finished(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """One whole run of the (shrunk) demo in a store that later tests read."""
    store = tmp_path_factory.mktemp("finished") / "store"
    command = [sys.executable, "-m", "flows.cli", "demo", *SMALL, "--store", str(store), "--json"]
    done = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return store, Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def store(finished: tuple) -> str:
    return str(finished[0])


def test_a_run_seals_every_stage_and_reports(finished: tuple) -> None:
    result = finished[1].json
    assert list(result) == [
        "artifacts", "counts", "version", "diff", "waiting", "model", "forecast", "seconds", "ui",
        "report",
    ]  # fmt: skip
    assert list(result["artifacts"]) == [
        "search", "cut", "embed", "describe", "calibrate", "pool", "buckets", "pairs", "alike",
        "curate", "pack", "pretrain", "evaluate", "report",
    ]  # fmt: skip
    for counts in result["counts"].values():
        assert counts["rows_in"] == counts["rows_out"] + sum(counts["dropped"].values())
    assert result["counts"]["pack"]["rows_out"] > 50
    page = Path(result["report"]).read_text()
    assert "<img" in page
    for stage, artifact in result["artifacts"].items():
        assert stage == "report" or artifact.rpartition("/")[2] in page, stage
    assert result["ui"].startswith("http://127.0.0.1")


def test_an_unchanged_world_is_found_in_the_catalogue(
    finished: tuple, geofm: Geofm, store: str
) -> None:
    again = geofm("demo", *SMALL, "--store", store, "--json")
    assert again.code == 0
    assert again.json["artifacts"] == finished[1].json["artifacts"]
    assert "found in the catalogue" in again.stderr


def test_training_on_a_published_dataset_searches_nothing(
    finished: tuple, geofm: Geofm, store: str
) -> None:
    away = ("--set", "search.stac=http://127.0.0.1:9/away")
    ref = finished[1].json["version"]["ref"]
    again = geofm("run", "demo", *SMALL, *away, "--dataset", ref, "--store", store, "--json")
    assert again.code == 0, again.stderr
    assert again.json["artifacts"]["pack"] == finished[1].json["artifacts"]["pack"]
    assert again.json["artifacts"]["pretrain"] == finished[1].json["artifacts"]["pretrain"]
    assert again.json["version"]["ref"] == ref
    for wrong, words in (("nothing", "geofm list"), ("demo-model", "is a model")):
        done = geofm("run", "demo", *SMALL, "--dataset", wrong, "--store", store)
        assert (done.code, done.stdout) == (2, "")
        assert words in done.stderr


def test_an_unchanged_refresh_imports_no_networks(
    finished: tuple, environment: dict[str, str], tmp_path: Path
) -> None:
    line = ["refresh", "demo", *SMALL, "--store", str(finished[0]), "--json"]
    run = "from flows.cli.main import main; main()"
    names = imported_by(run, *line, env=environment, cwd=tmp_path)
    assert "prefect" in names
    assert not names & NETWORKS


def test_samples_lead_back_to_asset_and_licence(geofm: Geofm, store: str) -> None:
    folder = Path(geofm("path", "demo", "--store", store).stdout.strip())
    keys = sorted(pd.read_parquet(folder / "index.parquet")["key"])
    for key in random.Random(0).sample(keys, 3):
        found = geofm("trace", f"demo/{key}", "--store", store, "--json").json
        assert found["sample"]["key"] == key
        assert found["item"]["item_id"] == found["chip"]["item_id"]
        assert found["licence"] == "CC0-1.0"
        assert {a["band"] for a in found["assets"]} >= {"red", "green", "blue", "nir"}
        assert all(a["href"].startswith("planet:/") and len(a["sha256"]) == 64
                   for a in found["assets"])  # fmt: skip
        assert found["window"]["width"] == 128
        assert found["settings"]["chips"]["size_px"] == 128
        assert found["decision"]["decision"] == "keep"
    licences = geofm("licences", "demo", "--store", store, "--json").json["licences"]
    assert {row["licence"] for row in licences} == {"CC0-1.0"}
    assert sum(row["samples"] for row in licences) == len(keys)


def test_a_models_cost_is_that_of_every_stage_it_comes_from(
    finished: tuple, geofm: Geofm, store: str
) -> None:
    made = finished[1].json["artifacts"]
    cost = geofm("show", made["pretrain"], "--store", store, "--json").json["cost"]
    stages = [one["stage"] for one in cost["stages"]]
    assert stages == list(made)[: list(made).index("pretrain") + 1]
    assert [one["digest"] for one in cost["stages"]] == [made[stage] for stage in stages]
    for name in ("seconds", "kwh", "kg_co2e"):
        total = sum(one[name] for one in cost["stages"])
        assert cost["total"][name] == pytest.approx(total, rel=1e-12)
        assert total > 0
    assert "| buckets" in geofm("show", made["pretrain"], "--store", store).stdout.replace("│", "|")
    page = Path(finished[1].json["report"]).read_text()
    section = page.partition('<section id="cost">')[2].partition("</section>")[0]
    assert all(f">{stage}<" in section for stage in [*stages, "evaluate"])


def test_a_model_is_exported_by_its_kind_and_timm_loads_it(
    finished: tuple, geofm: Geofm, store: str
) -> None:
    made = finished[1].json["artifacts"]
    folder = Path(geofm("export", made["pretrain"], "--store", store, "--json").json["path"])
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert network(torch.zeros(1, 4, 96, 96)).shape == (1, network.num_features)
    card = (folder / "README.md").read_text()
    assert "license: cc0-1.0" in card
    assert "| pretrain |" in card
    done = geofm("export", made["pretrain"], "--format", "stac", "--store", store, "--json")
    item = json.loads(Path(done.json["path"]).read_text())
    assert item["links"][0]["href"] == f"urn:sha256:{made['pack']}"
    west, south, east, north = item["bbox"]
    assert 5.5 < west < east < 6
    assert 45 < south < north < 45.5


def test_dropped_chips_name_a_kept_witness(
    finished: tuple, geofm: Geofm, store: str, tmp_path: Path
) -> None:
    digest = finished[1].json["artifacts"]["curate"]
    folder = Path(geofm("path", digest, "--store", store).stdout.strip())
    decisions = pd.read_parquet(folder / "decisions.parquet")
    fallen = decisions[decisions["rule"] == "near_duplicate"].iloc[0]
    answer = geofm("why", fallen["chip_id"], "--in", "demo", "--store", store, "--json").json
    assert answer["decision"] == "drop"
    assert answer["witness_id"] == fallen["witness_id"]
    assert answer["similarity"] >= 0.95
    pair = Image.open(answer["picture"])
    assert pair.size == (2 * 384 + 4, 384)
    kept = decisions[decisions["decision"] == "keep"]["chip_id"].iloc[0]
    own = str(tmp_path / "one.png")
    asked = geofm("why", kept, "--in", "demo", "--picture", own, "--store", store, "--json")
    assert asked.json["picture"] == own
    assert Image.open(own).size == (384, 384)
    nowhere = str(tmp_path / "no" / "one.png")
    asked = geofm("why", kept, "--in", "demo", "--picture", nowhere, "--store", store)
    assert asked.code == 2
    assert "--picture" in asked.stderr


def test_verify_recuts_and_finds_a_flipped_bit(geofm: Geofm, store: str, tmp_path: Path) -> None:
    whole = geofm("verify", "demo", "--deep", "--recut", "10", "--store", store, "--json")
    assert whole.code == 0, whole.stderr
    assert whole.json["recut_identical"] == 10
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    text = (copy / "catalogue.db").read_bytes()
    assert text  # the copy's catalogue still names the old place, so look at the copy through it
    folder = Path(geofm("path", "demo", "--store", store).stdout.strip())
    shard = sorted(folder.glob("shards/*.tar"))[0]
    index = pd.read_parquet(folder / "index.parquet")
    row = index[index["shard"] == f"shards/{shard.name}"].iloc[0]
    before = shard.read_bytes()
    damaged = bytearray(before)
    damaged[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    try:
        shard.write_bytes(damaged)
        found = geofm("verify", "demo", "--store", store)
    finally:
        shard.write_bytes(before)
    assert found.code == 4
    assert shard.name in found.stderr
    assert row["key"] in found.stderr
    assert geofm("verify", "demo", "--store", store).code == 0


BAD = {
    "unknown recipe": (["run", "dmo"], 2, "did you mean 'demo'"),
    "unknown field": (["run", "demo", "--set", "cut.size=1"], 2, "did you mean 'size_px'"),
    "out of bounds": (["run", "demo", "--set", "cut.size_px=3"], 2, "cut.size_px"),
    "no such API": (["refresh", "demo", "--stac", "http://127.0.0.1:9/stac"], 3, "127.0.0.1:9"),
    "nothing found": (
        ["refresh", "demo", "--set", "search.datetime=1999-01-01/1999-01-02"], 3, "datetime",
    ),
    "no store": (["trace", "nothing"], 2, "--store or GEOFM_STORE"),
    "bad store": (["list", "--store", "/proc/nowhere"], 2, "--store or GEOFM_STORE"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_is_one_message_with_a_remedy(geofm: Geofm, case: str) -> None:
    arguments, code, words = BAD[case]
    done = geofm(*arguments)
    assert (done.code, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_reference_names_the_command_that_lists(geofm: Geofm, store: str) -> None:
    done = geofm("trace", "nothing", "--store", store)
    assert (done.code, done.stdout) == (2, "")
    assert "geofm list" in done.stderr


def test_a_budget_beyond_the_pool_names_the_pool(geofm: Geofm, store: str) -> None:
    done = geofm("refresh", "demo", *SMALL, "--set", "curate.budget=100000", "--store", store)
    assert done.code == 2
    assert "curate.budget" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_weights_name_the_offline_encoder(geofm: Geofm, store: str) -> None:
    started = time.monotonic()
    done = geofm("refresh", "demo", *SMALL, "--set", "embed.encoder=resnet18", "--store", store)
    assert done.code in (2, 3)
    assert "efficientnet-lite0" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
