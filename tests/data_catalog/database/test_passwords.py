"""A database's password is in no message and in no record."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.address import hide_password, parse_database
from data_catalog.database.connection import CatalogueUnreachable
from data_catalog.errors import RunError
from tests.data_catalog.helpers import NO_STORE

S = "hUsh7"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://user:{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://127.0.0.1:1/db?user=me&password={S}",
        f"postgresql+psycopg://127.0.0.1:1/db?password={S}&user=me&connect_timeout=1",
        f"postgresql+psycopg://user:a%40{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://user:a/{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://user:a@{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://user:a@b:{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://user:a@b/{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://host:{S}/db",
        f"postgresql+psycopg:user:{S}@127.0.0.1/db",
        f"host=127.0.0.1 password={S}",
        f"nodialect://user:{S}@127.0.0.1:1/db",
        f"postgresql+psycopg://user:{S}@127.0.0.1:1/db?sslpassword={S}&sslmode=x",
    ],
)
def test_no_spelling_of_a_password_is_shown(url: str) -> None:
    with pytest.raises(CatalogueUnreachable, match="--catalog or GEOFM_CATALOG") as caught:
        open_catalogue(url, NO_STORE)
    assert S not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("password", ["a@b", "@", "a@b@c"])
def test_a_raw_at_sign_is_named(password: str) -> None:
    with pytest.raises(CatalogueUnreachable, match=r"percent-encode.*@ is %40"):
        open_catalogue(f"postgresql+psycopg://user:{password}@127.0.0.1:1/db", NO_STORE)


def test_a_drivers_text_is_hidden_in_every_spelling() -> None:
    url = parse_database("postgresql://u:p%40ss%20word@h/d?password=second")
    text = "no host 'p@ss word', p%40ss%20word, p%40ss+word, second"
    assert hide_password(text, url) == "no host '***', ***, ***, ***"


def test_addresses_without_a_password_are_shown(tmp_path: Path) -> None:
    with pytest.raises(CatalogueUnreachable, match=r"sqlite:////nowhere/me@x/y\.db"):
        open_catalogue("sqlite:////nowhere/me@x/y.db", NO_STORE)
    assert open_catalogue(f"sqlite:///{tmp_path}/a@b.db", NO_STORE).runs() == []


def test_the_run_record_holds_no_secret(catalogue: Catalogue) -> None:
    with pytest.raises(OSError, match="hush"), catalogue.run("search", "k"):
        raise OSError("url: /v1?token=hush (https://u:hush@h/x) password=hush")
    (row,) = catalogue.runs()
    assert row.error
    assert row.error == "OSError: url: /v1?token=*** (https://***@h/x) password=***"
    assert "hush" not in str(RunError("cannot read https://u:hush@h/x?sig=hush&se=1"))
