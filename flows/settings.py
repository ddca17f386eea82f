"""Open the store and the catalogue that a flag or the environment names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.address import sqlite_address
from data_catalog.errors import UsageError
from data_catalog.store import Store, open_store

#: Variable that, if set, makes a run stop at once where it would wait for another one.
NO_WAIT = "GEOFM_NO_WAIT"
#: Variable with the address at which `geofm up` serves reports (flows/service/pages.py).
PAGES = "GEOFM_PAGES"
#: Variable with the webhook that gets a message when a run fails.
NOTIFY_URL = "GEOFM_NOTIFY_URL"
#: Seconds between two heartbeats of a run, for the environment of its process.
HEARTBEAT_S = "30"


@dataclass(frozen=True)
class Place:
    """An open store with its catalogue."""

    store: Store
    catalogue: Catalogue

    def clean_up(self) -> None:
        """Clean up after killed processes: call this before the first write."""
        self.store.sweep()
        self.catalogue.close_lost_runs()


def open_place(store: str = "", catalog: str = "", write: bool = True) -> Place:
    """Open the store and the catalogue.

    Args:
        store: address of the store; empty for ``GEOFM_STORE``, or else ./geofm-store.
        catalog: SQLAlchemy address of the catalogue; empty for ``GEOFM_CATALOG``, or else
            catalogue.db in the store.
        write: True creates a missing store. Commands that only read pass False: nothing is
            written, and a mistyped address is an error.

    Raises:
        BadAddress: the store's address is invalid, or holds a secret.
        StoreNotWritable: the store cannot be written.
        NoStore: the store does not exist, and ``write`` is False.
        CatalogueUnreachable: the catalogue does not answer.
    """
    opened = open_store(store or os.environ.get("GEOFM_STORE") or "geofm-store", write)
    url = catalog or os.environ.get("GEOFM_CATALOG")
    own = sqlite_address(opened.local_root / "catalogue.db")
    return Place(opened, open_catalogue(url or own, opened, write))


def may_wait() -> bool:
    """Tell whether a run waits while another one refreshes the same dataset or trains the model."""
    return not os.environ.get(NO_WAIT)


def report_address(digest: str) -> str:
    """Return the address of a report for a browser; empty if the process knows of no server."""
    base = os.environ.get(PAGES, "")
    return f"{base}/reports/{digest}/report.html" if base else ""


def take_notify_url() -> str:
    """Take the webhook of the failure notice out of the environment; empty if none is given.

    The address may be a secret, so the server and the workers do not inherit it.

    Raises:
        UsageError: It is no http or https address.
    """
    url = os.environ.pop(NOTIFY_URL, "").strip()
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_address = False
    if url and not is_address:
        raise UsageError(f"{NOTIFY_URL} is not the http or https address of a webhook; correct it")
    return url
