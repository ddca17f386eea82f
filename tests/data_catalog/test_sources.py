"""Source profiles: which one covers a collection, the user's own first, and clear refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from data_catalog.provenance.licences import spdx_expression
from data_catalog.sources import (
    BadSource,
    Source,
    load_sources,
    read_sources,
    source_for,
    source_named,
)

EARTH = "https://earth-search.aws.element84.com/v1"
PC = "https://planetarycomputer.microsoft.com/api/stac/v1/"


@pytest.mark.parametrize(
    ("api", "collection", "name"),
    [
        ("planet", "planet-s2", "planet-s2"),
        ("planet", "anything", "planet"),
        (EARTH, "sentinel-2-c1-l2a", "earth-search-sentinel-2"),
        (EARTH, "landsat-c2-l2", "earth-search-landsat-c2-l2"),
        (EARTH, "naip", "earth-search-naip"),
        (EARTH, "sentinel-2-l2a", "earth-search-sentinel-2"),
        (EARTH, "sentinel-2-l1c", "earth-search-sentinel-2-l1c"),
        (PC, "sentinel-2-l2a", "planetary-computer-sentinel-2"),
        (PC, "naip", "planetary-computer-naip"),
        (PC, "landsat-c2-l2", "planetary-computer-landsat-c2-l2"),
        (PC, "hls2-l30", "planetary-computer-hls-l30"),
        (PC, "3dep-seamless", "planetary-computer"),
        ("http://localhost:8000", "sentinel-2-l1c", "sentinel-2"),
        ("http://localhost:8000", "my-drone", "generic"),
    ],
)
def test_a_collection_finds_its_profile(api: str, collection: str, name: str) -> None:
    assert source_for(api, collection).name == name


def test_names_are_unique_and_generic_is_last() -> None:
    names = [source.name for source in load_sources()]
    assert len(names) == len(set(names))
    assert names[-1] == "generic"
    with pytest.raises(BadSource, match="GEOFM_SOURCES"):
        source_named("no such profile")


def test_every_profile_has_a_licence_and_the_planet_is_free() -> None:
    assert all(spdx_expression(source.licence) for source in load_sources())
    assert source_for("planet", "planet-hr").licence == "CC0-1.0"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("CC-BY-4.0", "CC-BY-4.0"),
        ("cc-by-4.0", "CC-BY-4.0"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("LicenseRef-mine", "LicenseRef-mine"),
        ("proprietary", None),
        ("various", None),
        ("other", None),
        ("", None),
        (7, None),
        (None, None),
        ("A AND (", None),
        ("x" * 10_000, None),
    ],
)
def test_licences_are_spdx_or_nothing(text: object, licence: str | None) -> None:
    assert spdx_expression(text) == licence


def test_a_profile_with_a_fault_is_refused() -> None:
    good = {"name": "x", "title": "x", "provider": "x", "licence": "MIT"}
    assert Source.model_validate(good).covers("http://any", "any")
    for change in ({"licence": "mine"}, {"identity": {"strip": "("}}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            Source.model_validate({**good, **change})


MINE = {"name": "mine", "title": "Mine", "provider": "me", "licence": "CC-BY-4.0"}


def write(path: Path, *profiles: dict) -> Path:
    path.write_text(yaml.safe_dump({"sources": list(profiles)}))
    return path


def test_the_users_own_profiles_are_asked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.yaml", {**MINE, "collections": ["naip"], "bands": {"red": "R"}})
    (folder / "notes.txt").write_text("no profile")
    one = tmp_path / "one.yml"
    one.write_text(yaml.safe_dump({**MINE, "name": "planet-s2", "collections": ["planet-s2"]}))
    monkeypatch.setenv("GEOFM_SOURCES", os.pathsep.join([str(folder), str(one)]))
    assert source_for(EARTH, "naip").bands["red"].asset == "R"
    assert source_for(EARTH, "landsat-c2-l2").name == "earth-search-landsat-c2-l2"
    # one of the same name takes the place of the built-in one
    assert source_for("planet", "planet-s2").title == "Mine"
    assert [s.name for s in load_sources()].count("planet-s2") == 1
    monkeypatch.delenv("GEOFM_SOURCES")
    assert source_for(EARTH, "naip").name == "earth-search-naip"


BAD = {
    "no yaml": ("{", "can't be read as YAML"),
    "a list": ("- 1", "is not a profile; it needs name"),
    "empty": ("", "is not a profile"),
    "no list": ("sources: 7", "must be a list of profiles"),
    "a text": ("sources: [x]", r"sources\[0\]. is not a profile"),
    "a field missing": ("sources: [{name: a, title: a, provider: a}]", r"\[0\].licence is missing"),
    "an unknown field": (
        yaml.safe_dump({**MINE, "colour": 1}), "colour is not a field of a profile .known: name",
    ),
    "a licence": (yaml.safe_dump({**MINE, "licence": "mine"}), "licence: 'mine' is neither"),
    "an endpoint": (yaml.safe_dump({**MINE, "endpoint": "minio:9000"}), "endpoint: .*minio:9000"),
    "an index": (
        yaml.safe_dump({**MINE, "bands": {"red": {"asset": "x", "index": 0}}}), "bands.red.index",
    ),
    "a band": (yaml.safe_dump({**MINE, "bands": {"red": 4}}), "bands.red"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_by_file_field_and_remedy(case: str, tmp_path: Path) -> None:
    text, words = BAD[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadSource, match=words) as caught:
        read_sources(path)
    assert str(path) in str(caught.value)


def test_what_geofm_sources_names_must_be_there_and_unique(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "twice.yaml", MINE, MINE)
    for place, words in {
        str(tmp_path / "none.yaml"): "there is no file",
        str(tmp_path / "twice.yaml"): "two profiles are named 'mine'",
    }.items():
        monkeypatch.setenv("GEOFM_SOURCES", place)
        with pytest.raises(BadSource, match=words):
            load_sources()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("GEOFM_SOURCES", str(empty))
    with pytest.raises(BadSource, match=r"empty has no \.yaml file"):
        load_sources()


def test_requester_pays_and_radiometry_are_stated_where_the_providers_state_them() -> None:
    landsat = source_for(EARTH, "landsat-c2-l2")
    assert (landsat.default_scale, landsat.default_offset) == (2.75e-5, -0.2)
    paid = {s.name for s in load_sources() if s.requester_pays}
    assert paid == {
        "earth-search-landsat-c2-l2", "earth-search-naip", "earth-search-sentinel-2-l1c",
    }  # fmt: skip
    assert all(s.sign_when == "always" for s in load_sources() if s.name.startswith("planetary"))
