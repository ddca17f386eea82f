from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_catalog.sources import Source, load_sources, source_for, source_named, spdx_licence

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
        (PC, "sentinel-2-l2a", "planetary-computer-sentinel-2"),
        (PC, "naip", "planetary-computer-naip"),
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
    assert source_named("no such profile").name == "generic"


def test_every_profile_has_a_licence_and_the_planet_is_free() -> None:
    assert all(spdx_licence(source.licence) for source in load_sources())
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
    assert spdx_licence(text) == licence


def test_a_profile_with_a_fault_is_refused() -> None:
    good = {"name": "x", "title": "x", "provider": "x", "licence": "MIT"}
    assert Source.model_validate(good).covers("http://any", "any")
    for change in ({"licence": "mine"}, {"identity": {"strip": "("}}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            Source.model_validate({**good, **change})
