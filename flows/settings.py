"""Where a run keeps its things: the store and the catalogue, by flag or environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.errors import UsageError
from data_catalog.storage.address import holds_password, sqlite_address
from data_catalog.store import Store, open_store


@dataclass(frozen=True)
class Place:
    """An opened store with its catalogue."""

    store: Store
    catalogue: Catalogue

    def clean_up(self) -> None:
        """Clean up after killed processes. Commands that write call this when they start."""
        self.store.sweep()
        self.catalogue.close_lost_runs()


def open_place(store: str = "", catalog: str = "", write: bool = True) -> Place:
    """Open the store and the catalogue.

    Args:
        store: address; empty means ``GEOFM_STORE``, else ./geofm-store.
        catalog: SQLAlchemy address; empty means ``GEOFM_CATALOG``, else catalogue.db in the store.
        write: create what does not exist. A command that only reads passes False: it then writes
            nothing into the store, and a mistyped address is an error.

    Raises:
        BadAddress: the store's address means nothing, or holds a secret.
        StoreNotWritable: the store cannot be written.
        NoStore: there is no store, and ``write`` is False.
        CatalogueUnreachable: the catalogue does not answer.
    """
    opened = open_store(store or os.environ.get("GEOFM_STORE") or "geofm-store", write)
    url = catalog or os.environ.get("GEOFM_CATALOG")
    own = sqlite_address(opened.local_root / "catalogue.db")
    return Place(opened, open_catalogue(url or own, opened, write))


def refuse_typed_password(catalog: str) -> None:
    """Refuse a catalogue's password in a parameter of a flow, which Prefect stores.

    Raises:
        UsageError: with the remedy.
    """
    if catalog and holds_password(catalog):
        raise UsageError(
            "catalog: the address holds a password, and Prefect stores the parameters of a run: "
            "leave the field empty, and set GEOFM_CATALOG where the worker runs"
        )
