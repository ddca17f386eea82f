"""Addresses as users write them, and catalogues that can only be read."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from data_catalog.artifact import cache_folder
from data_catalog.catalogue import open_catalogue
from data_catalog.database.address import (
    catalogue_address,
    shown_address,
    sqlite_address,
    sqlite_path,
)
from data_catalog.database.connection import CatalogueUnreachable
from data_catalog.run import run_stage
from data_catalog.storage.address import BadAddress, local_folder, store_address
from data_catalog.store import NoStore, open_store
from tests.data_catalog.helpers import NO_STORE, NUMBERS, Settings

ODD = ["a b", "a?b", "a#b", "a%20b", "é 日本", "a&b=c", "a::b", "a[1]*", "x?uri=true", "a;b", "a'b"]


@pytest.mark.parametrize(
    ("text_", "expected"),
    [
        ("~/store", "{home}/store"),
        ("~", "{home}"),
        ("$HOME/store", "{home}/store"),
        ("${HOME}/store", "{home}/store"),
        ("$HOMELY/store", "{cwd}/$HOMELY/store"),
        ("store/", "{cwd}/store"),
        ("./a/../store", "{cwd}/store"),
        ("file:///data/a%20b", "/data/a b"),
        ("file:///data/a b?c#d/", "/data/a b?c#d"),
        ("file://localhost/data", "/data"),
        ("file:/data", "/data"),
        ("a?b#c%20d", "{cwd}/a?b#c%20d"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket/a b?c#d%20", "s3://bucket/a b?c#d%20"),
    ],
)
def test_a_store_is_where_a_user_means_it(
    text_: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    wanted = expected.format(home=tmp_path / "home", cwd=tmp_path)
    assert store_address(text_) == wanted
    assert store_address(wanted) == wanted


@pytest.mark.parametrize("text_", ["", "a\0b", "file://host/x", "~nobody-has-this-name/x"])
def test_an_address_that_means_nothing_is_refused(text_: str) -> None:
    with pytest.raises(BadAddress):
        local_folder(text_)


def test_the_cache_may_be_below_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GEOFM_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_any_path_comes_back_from_the_address_of_its_catalogue(name: str) -> None:
    path = Path("/data") / name / "catalogue.db"
    if name in (".", ".."):
        return
    address = sqlite_address(path)
    assert sqlite_path(address) == path
    assert catalogue_address(address) == address


@pytest.mark.parametrize("name", ODD)
def test_a_store_of_any_name_holds_its_own_catalogue(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / name)
    address = sqlite_address(store.local_root / "catalogue.db")
    made = run_stage(NUMBERS, store, open_catalogue(address, store), {}, Settings())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    again = open_catalogue(address, open_store(tmp_path / name, write=False), write=False)
    assert again.get(made.digest).json("numbers.json") == [0, 1, 2, 3, 4, 5]


def test_a_symlinked_store_is_one_store(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    store = open_store(tmp_path / "link")
    catalogue = open_catalogue(sqlite_address(tmp_path / "link" / "catalogue.db"), store)
    made = run_stage(NUMBERS, store, catalogue, {}, Settings())
    direct = open_store(tmp_path / "disk")
    found = open_catalogue(sqlite_address(tmp_path / "disk" / "catalogue.db"), direct)
    assert found.get(made.digest).json("numbers.json") == made.json("numbers.json")


def test_a_password_is_masked_wherever_it_stands() -> None:
    for address in (
        "postgresql+psycopg://user:hu%40sh@host/db",
        "postgresql+psycopg://host/db?user=me&password=hush",
    ):
        assert "sh" not in shown_address(address).replace("host", "")


@pytest.mark.parametrize("what", ["nothing", "folder", "file"])
def test_reading_a_store_that_is_not_there_makes_nothing(tmp_path: Path, what: str) -> None:
    place = tmp_path / "mistyped"
    if what == "folder":
        place.mkdir()
    elif what == "file":
        place.write_text("a file")
    with pytest.raises(NoStore, match="mistyped"):
        open_store(place, write=False)
    with pytest.raises(CatalogueUnreachable, match="mistyped"):
        open_catalogue(sqlite_address(place / "catalogue.db"), NO_STORE, write=False)
    assert [*tmp_path.iterdir()] == ([] if what == "nothing" else [place])
    assert not place.is_dir() or not [*place.iterdir()]


def test_a_catalogue_is_read_with_what_is_still_in_its_log(tmp_path: Path) -> None:
    """Copies of a database that a process has open: with its log, and without."""
    store = open_store(tmp_path / "store")
    path = tmp_path / "store" / "catalogue.db"
    catalogue = open_catalogue(sqlite_address(path), store)
    made = run_stage(NUMBERS, store, catalogue, {}, Settings())
    for name, suffixes in (("whole", ("", "-wal")), ("bare", ("",))):
        copy = tmp_path / name
        copy.mkdir()
        for suffix in suffixes:
            shutil.copyfile(f"{path}{suffix}", copy / f"catalogue.db{suffix}")
        copy.chmod(0o555)
        for file in copy.iterdir():
            file.chmod(0o444)
    found = open_catalogue(sqlite_address(tmp_path / "whole" / "catalogue.db"), store, write=False)
    assert [row.digest for row in found.artifacts()] == [made.digest]
    with pytest.raises(CatalogueUnreachable, match=r"copy catalogue\.db-wal"):
        open_catalogue(sqlite_address(tmp_path / "bare" / "catalogue.db"), store, write=False)


def test_closing_the_catalogue_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.db"
    catalogue = open_catalogue(sqlite_address(path), NO_STORE)
    assert path.with_name("catalogue.db-wal").exists()
    del catalogue
    assert [file.name for file in tmp_path.iterdir()] == ["catalogue.db"]
    assert sqlite3.connect(path).execute("select count(*) from artifact").fetchone() == (0,)


def test_a_role_that_may_only_read_reads_a_catalogue_on_postgresql(postgres_url: str) -> None:
    owner = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(text("CREATE DATABASE reading"))
        connection.execute(text("CREATE ROLE auditor LOGIN"))
    address = owner.url.set(database="reading")
    whole = open_catalogue(address.render_as_string(hide_password=False), NO_STORE)
    with whole.engine.begin() as connection:
        connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO auditor"))
    reader = address.set(username="auditor").render_as_string(hide_password=False)
    found = open_catalogue(reader, NO_STORE, write=False)
    assert found.artifacts() == []
    assert found.names() == []
