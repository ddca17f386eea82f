"""Cutting again after the source was replaced: what has changed is named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from geofm.chips import items as listed
from geofm.chips.recut import recut
from geofm.remote import url_policy
from tests.geofm.chips.test_cut import Run, good
from tests.geofm.stac.small_world import add_scene, serve, texture


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with serve() as world:
        store = open_store(tmp_path / "store")
        yield Run(store, open_catalogue(f"sqlite:///{tmp_path}/c.db", store), world)


PATH = "/files/a/red.tif"


def add(run: Run, checksum: bool) -> None:
    """Serve a scene whose item states the checksum of its file, or does not."""
    item = add_scene(run.world, "a", {"red": texture(70, 100)})
    if not checksum:
        item["assets"]["red"].pop("file:checksum")


def replace_file(run: Run) -> tuple[str, str]:
    """Put another image in the file's place: the old digest and the new one."""
    before, items = run.world.files[PATH], run.world.items[:]
    add_scene(run.world, "a", {"red": texture(70, 100, seed=9)})
    run.world.items[:] = items
    assert run.world.files[PATH] != before
    digests = [hashlib.sha256(data).hexdigest() for data in (before, run.world.files[PATH])]
    return digests[0], digests[1]


@pytest.mark.parametrize("checksum", [False, True])
def test_a_replaced_file_is_named_with_both_digests(run: Run, checksum: bool) -> None:
    add(run, checksum)
    chips, items = run.chips(), run.items()
    before, after = replace_file(run)
    for one in recut(chips, items, list(good(chips).chip_id)):
        assert one.got != one.expected
        assert one.problem.startswith("wrong_checksum") == checksum
        assert f"sha256 is {after}, was {before} when it was sealed" in one.changed
        assert PATH in one.changed


def test_a_chip_whose_pixels_the_replaced_file_still_has_is_the_same(run: Run) -> None:
    add(run, checksum=False)
    chips, items = run.chips(), run.items()
    pixels, current_items = texture(70, 100), run.world.items[:]
    pixels[:32, :32] += 7
    add_scene(run.world, "a", {"red": pixels})
    run.world.items[:] = current_items
    results = recut(chips, items, list(good(chips).chip_id))
    assert 0 < sum(one.is_same for one in results) < len(results)
    assert all(one.is_same == (one.changed == "") for one in results)
    assert all(bool(one.differences()) == bool(one.changed) for one in results)


def test_a_replaced_file_that_can_not_be_cut_is_named_as_well(run: Run) -> None:
    add_scene(run.world, "a", {"red": texture(70, 100)})
    chips, items = run.chips(), run.items()
    before = run.world.files[PATH]
    run.world.files[PATH] = b"II*\0 no longer an image"
    one = recut(chips, items, [good(chips).chip_id.iloc[0]])[0]
    assert one.problem
    assert hashlib.sha256(before).hexdigest() in one.changed


def test_a_file_that_is_read_in_ranges_is_named_by_etag_or_size(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = listed.access_of

    def ranges_only(*args: Any) -> url_policy.Access:
        return replace(right(*args), whole_max=0)

    for module in ("cut", "recut", "plan"):
        monkeypatch.setattr(f"geofm.chips.{module}.access_of", ranges_only)
    run.world.headers[PATH] = {"ETag": '"first"'}
    add(run, checksum=False)
    chips, items = run.chips(), run.items()
    # some answers of this server also have an ETag of its own
    assert all('"first"' in etag for etag in chips.table("assets.parquet")["etag"])
    run.world.headers[PATH] = {"ETag": '"second"'}
    replace_file(run)
    one = recut(chips, items, [good(chips).chip_id.iloc[0]])[0]
    assert re.search(r'etag is .*"second", was .*"first" when it was sealed', one.changed)


def test_a_source_that_does_not_answer_has_not_changed(run: Run) -> None:
    add_scene(run.world, "a", {"red": texture(70, 100)})
    chips, items = run.chips(), run.items()
    run.world.faults[PATH] += [503] * 20
    one = recut(chips, items, [good(chips).chip_id.iloc[0]])[0]
    assert one.problem.startswith("unreachable")
    assert one.changed == ""
