"""The connection to the catalogue's database, with its tables brought up to date.

A SQLite catalogue that cannot be written (read-only folder, full disk) is read from a copy in
memory, which is also where its tables are brought up to date.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, StaticPool, create_engine, event, text
from sqlalchemy.exc import DatabaseError, OperationalError, ProgrammingError, SQLAlchemyError

from data_catalog.errors import CheckError, UsageError
from data_catalog.storage.address import (
    BadAddress,
    catalogue_address,
    hide_password,
    parse_database,
    shown_address,
    sqlite_path,
)

MIGRATIONS = Path(__file__).parent / "migrations"
#: Seconds to wait for another process that writes to a SQLite file.
BUSY_S = 60
#: How a database says that its file is damaged.
_DAMAGED = re.compile("malformed|not a database|corrupt", re.IGNORECASE)


class CatalogueUnreachable(UsageError):
    """The catalogue's address does not answer."""


class NoCatalogue(CatalogueUnreachable):
    """There is no catalogue at the address, or an empty file."""


def connect(address: str, write: bool = True) -> tuple[str, Engine]:
    """Connect to a catalogue and bring its tables up to date.

    Args:
        address: SQLAlchemy address.
        write: Create the catalogue where there is none. Without it a missing catalogue is an
            error, and one that cannot be written is read.

    Returns:
        The address with an absolute path, and the engine.

    Raises:
        CatalogueUnreachable: With the address (no password) and the remedy.
    """
    remedy = "SQLAlchemy knows with --catalog or GEOFM_CATALOG, e.g. sqlite:///catalogue.db"
    try:
        parsed = parse_database(address)
    except ValueError as error:
        raise CatalogueUnreachable(
            f"cannot open the catalogue: {error}, and give an address {remedy}"
        ) from None
    try:
        found = catalogue_address(address)
        path = sqlite_path(found)
        if path is None or write:
            return found, _opened(found)
        return found, _opened_for_reading(found, path)
    except (SQLAlchemyError, sqlite3.Error, ModuleNotFoundError, ValueError, BadAddress) as error:
        reason = str(error).splitlines()[0]
        shown = hide_password(reason, parsed)
        raise CatalogueUnreachable(
            f"cannot open the catalogue {shown_address(address)} ({shown}); "
            f"give an address {remedy}"
        ) from (error if shown == reason else None)
    except OSError as error:
        raise CatalogueUnreachable(
            f"cannot read the catalogue {shown_address(address)} ({error.strerror})"
        ) from error


@contextmanager
def rows_that_read(address: str) -> Iterator[None]:
    """Turn the errors of a damaged database, whose rows cannot be read, into one clear error.

    Raises:
        CheckError: A row cannot be read.
    """
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError, DatabaseError) as error:
        why = str(error).splitlines()[0]
        if isinstance(error, DatabaseError) and not _DAMAGED.search(why):
            raise
        raise CheckError(
            f"the catalogue {shown_address(address)} is damaged: a row cannot be read ({why}); "
            "restore it from another copy"
        ) from error


def _opened(address: str) -> Engine:
    """Open a database in which this process may write."""
    sqlite = address.startswith("sqlite")
    engine = create_engine(address, connect_args={"timeout": BUSY_S} if sqlite else {})
    if sqlite:
        event.listen(engine, "connect", _sqlite_settings)
    _migrate(engine)
    return engine


def _opened_for_reading(address: str, path: Path) -> Engine:
    """Open a SQLite file that must exist; a copy in memory where it cannot be written."""
    if not path.exists():
        raise NoCatalogue(
            f"there is no catalogue at {path}: name the store with --store or GEOFM_STORE, or its "
            "catalogue with --catalog or GEOFM_CATALOG"
        )
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        try:
            probe = create_engine(address, connect_args={"timeout": BUSY_S})
            try:
                _require_tables(probe, path)
            finally:
                probe.dispose()
            return _opened(address)
        except OperationalError:  # the disk is full, or not writable in spite of its modes
            pass
    memory = _snapshot(path)
    engine = create_engine("sqlite://", creator=lambda: memory, poolclass=StaticPool)
    _require_tables(engine, path)
    _migrate(engine)
    return engine


def _snapshot(path: Path) -> sqlite3.Connection:
    """Copy a SQLite file that cannot be written into memory, its write-ahead log included."""
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    log = path.with_name(f"{path.name}-wal")
    try:
        with closing(_read_only(path, "mode=ro")) as source:
            source.backup(memory)
    except sqlite3.OperationalError:  # SQLite may not make the index of the log beside it
        if not log.exists() or not log.stat().st_size:
            with closing(_read_only(path, "immutable=1")) as source:
                source.backup(memory)
            return memory
        with tempfile.TemporaryDirectory() as folder:
            for file in (path, log):
                shutil.copyfile(file, Path(folder) / file.name)
            with closing(sqlite3.connect(Path(folder) / path.name)) as source:
                source.backup(memory)
    return memory


def _read_only(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, timeout=BUSY_S)


def _require_tables(engine: Engine, path: Path) -> None:
    """Raise NoCatalogue for a SQLite file without the catalogue's tables."""
    with engine.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() is not None:
            return
    raise NoCatalogue(
        f"{path} holds no catalogue. If it was copied, copy {path.name}-wal beside it as well: "
        "while geofm runs, the newest rows are in that file"
    )


def _sqlite_settings(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _migrate(engine: Engine, attempts: int = 5) -> None:
    """Run the migrations that are missing; when two processes start at once, one waits."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    for attempt in range(attempts):
        try:
            with engine.connect() as connection:
                current = MigrationContext.configure(connection).get_current_revision()
                if current == head:
                    return
                if current and current not in {s.revision for s in scripts.walk_revisions()}:
                    raise CatalogueUnreachable(
                        f"the catalogue {shown_address(str(engine.url))} was written by a newer "
                        f"geofm (its tables are {current}, this version knows {head}): update geofm"
                    )
                if engine.dialect.name == "sqlite":
                    connection.execute(text("BEGIN IMMEDIATE"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
                return
        except (OperationalError, ProgrammingError):
            if attempt == attempts - 1:
                raise
            time.sleep(0.2 * 2**attempt)
