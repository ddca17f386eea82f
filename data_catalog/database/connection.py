"""Connect to the catalogue's database and bring its tables up to date.

A SQLite catalogue that cannot be written (read-only folder, full disk) is copied into memory; the
copy is brought up to date and read. Alembic is imported only if a migration has to run.
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

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event, inspect, text
from sqlalchemy.exc import DatabaseError, OperationalError, ProgrammingError, SQLAlchemyError

from data_catalog.database.address import (
    catalogue_address,
    hide_password,
    parse_database,
    shown_address,
    sqlite_path,
)
from data_catalog.errors import CheckError, UsageError, first_line
from data_catalog.storage.address import BadAddress

MIGRATIONS = Path(__file__).parent / "migrations"
#: Name of each migration's file: its revision, then its title.
_MIGRATION = re.compile(r"(\d{4})_\w+")
#: Seconds to wait for another process that writes to a SQLite file.
BUSY_S = 60
#: Words in the errors of a database whose file is damaged.
_DAMAGED = re.compile("malformed|not a database|corrupt", re.IGNORECASE)


class CatalogueUnreachable(UsageError):
    """The catalogue cannot be opened."""


class NoCatalogue(CatalogueUnreachable):
    """There is no catalogue at the address, or its file is empty."""


def connect(address: str, write: bool = True) -> tuple[str, Engine]:
    """Connect to a catalogue and bring its tables up to date.

    Args:
        address: SQLAlchemy address.
        write: Create the catalogue if it does not exist. If False, a missing catalogue is an error,
            and a catalogue that cannot be written is read.

    Returns:
        The address with an absolute path, and the engine.

    Raises:
        CatalogueUnreachable: It cannot be opened; the message has the address without password.
    """
    remedy = "SQLAlchemy knows with --catalog or GEOFM_CATALOG, e.g. sqlite:///catalogue.db"
    try:
        parsed = parse_database(address)
    except ValueError as error:
        raise CatalogueUnreachable(
            f"cannot open the catalogue: {error}, and give an address {remedy}"
        ) from None
    try:
        absolute = catalogue_address(address)
        path = sqlite_path(absolute)
        if path is None or write:
            return absolute, _open(absolute)
        return absolute, _open_for_reading(absolute, path)
    except (SQLAlchemyError, sqlite3.Error, ModuleNotFoundError, ValueError, BadAddress) as error:
        reason = first_line(error)
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
def readable_rows(address: str) -> Iterator[None]:
    """Raise one clear error while the block runs if a row of a damaged database cannot be read.

    Raises:
        CheckError: A row cannot be read.
    """
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError, DatabaseError) as error:
        reason = first_line(error)
        if isinstance(error, DatabaseError) and not _DAMAGED.search(reason):
            raise
        raise CheckError(
            f"the catalogue {shown_address(address)} is damaged: a row cannot be read ({reason}); "
            "restore it from another copy"
        ) from error


def _open(address: str) -> Engine:
    """Open a database for writing."""
    sqlite = address.startswith("sqlite")
    engine = create_engine(address, connect_args={"timeout": BUSY_S} if sqlite else {})
    if sqlite:
        event.listen(engine, "connect", _sqlite_settings)
    _migrate(engine)
    return engine


def _open_for_reading(address: str, path: Path) -> Engine:
    """Open a SQLite file that must exist; if it cannot be written, open a copy in memory."""
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
            return _open(address)
        except OperationalError:  # the disk is full, or not writable although its modes allow it
            pass
    memory = _snapshot(path)
    engine = create_engine("sqlite://", creator=lambda: memory, poolclass=StaticPool)
    _require_tables(engine, path)
    _migrate(engine)
    return engine


def _snapshot(path: Path) -> sqlite3.Connection:
    """Copy a SQLite file that cannot be written into memory, with its write-ahead log."""
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    log = path.with_name(f"{path.name}-wal")
    try:
        with closing(_read_only(path, "mode=ro")) as source:
            source.backup(memory)
    except sqlite3.OperationalError:  # SQLite may not create the log's index beside the file
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
        if _current_revision(connection) is not None:
            return
    raise NoCatalogue(
        f"{path} is not a catalogue: it has no tables. If it was copied, copy {path.name}-wal "
        "beside it as well: while geofm runs, the newest rows are in that file"
    )


def _sqlite_settings(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _current_revision(connection: Connection) -> str | None:
    """Return the revision of a database's tables; None for an empty database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def known_revisions() -> list[str]:
    """List the revisions that this version of geofm knows, in order, by the migrations' files."""
    names = (_MIGRATION.fullmatch(path.stem) for path in (MIGRATIONS / "versions").glob("*.py"))
    return sorted(name[1] for name in names if name)


def _migrate(engine: Engine, attempts: int = 5) -> None:
    """Run the migrations that are missing; if two processes start at once, one waits."""
    known = known_revisions()
    for attempt in range(attempts):
        try:
            with engine.connect() as connection:
                current = _current_revision(connection)
                if current == known[-1]:
                    return
                if current is not None and current not in known:
                    raise CatalogueUnreachable(
                        f"the catalogue {shown_address(str(engine.url))} was written by a newer "
                        f"geofm (its tables are {current}, this version knows {known[-1]}): "
                        "update geofm"
                    )
                if engine.dialect.name == "sqlite":
                    connection.execute(text("BEGIN IMMEDIATE"))
                _upgrade(connection)
                connection.commit()
                return
        except (OperationalError, ProgrammingError):
            if attempt == attempts - 1:
                raise
            time.sleep(0.2 * 2**attempt)


def _upgrade(connection: Connection) -> None:
    """Run Alembic's migrations up to the newest."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
