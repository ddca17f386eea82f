"""The history of items that wait: only an attempt that was made counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database import items
from data_catalog.database.item_states import WAITING, ItemState
from data_catalog.database.items import note_items, postponed_items, read_items
from tests.data_catalog.helpers import NO_STORE

KEY = ("c", "late")
STATE = ItemState(WAITING, "not_found", item_sha256="a" * 64)
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return open_catalogue(f"sqlite:///{tmp_path}/c.db", NO_STORE)


def at(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    monkeypatch.setattr(items, "now", lambda: moment)


def test_an_item_that_falls_due_while_a_run_lasts_was_not_asked_for(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = BEGIN + timedelta(days=16)  # the next attempt is due two days later
    for moment in (BEGIN, last):
        at(monkeypatch, moment)
        note_items(catalogue, "r", {KEY: STATE}, True, postponed_items(catalogue, "r"))
    due = last + timedelta(days=2)
    at(monkeypatch, due - timedelta(minutes=1))
    postponed = postponed_items(catalogue, "r")
    assert list(postponed) == [(*KEY, STATE.item_sha256)]
    at(monkeypatch, due + timedelta(minutes=1))
    note_items(catalogue, "r", {KEY: STATE}, True, postponed)
    entry = read_items(catalogue, "r")[KEY]
    assert (entry.tried, entry.tries) == (last, 2)
    assert not postponed_items(catalogue, "r"), "the next run asks for it"
    note_items(catalogue, "r", {KEY: STATE}, True, {})
    entry = read_items(catalogue, "r")[KEY]
    assert (entry.tried, entry.tries) == (due + timedelta(minutes=1), 3)
    assert entry.since == BEGIN
