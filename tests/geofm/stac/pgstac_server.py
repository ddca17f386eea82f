"""A real STAC API for tests: stac-fastapi-pgstac over PostgreSQL with PostGIS, on loopback.

Its packages conflict with those of Prefect (fastapi), so they have an environment of their own,
which ``make pgstac`` creates.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from geofm.types import Json

ROOT = Path(__file__).resolve().parents[3]


def find_python() -> Path:
    """Return the Python with stac-fastapi-pgstac; skips the test without one."""
    python = Path(os.environ.get("GEOFM_PGSTAC_PYTHON", ROOT / ".venv-pgstac/bin/python"))
    probe = "import stac_fastapi.pgstac, pypgstac, uvicorn"
    if not python.exists() or subprocess.run([python, "-c", probe], check=False).returncode:
        pytest.skip(
            "needs a Python with stac-fastapi-pgstac: `make pgstac`, or set GEOFM_PGSTAC_PYTHON"
        )
    return python


@contextmanager
def pgstac(
    postgres_url: str, database: str, collections: Sequence[Json], items: Sequence[Json], tmp: Path
) -> Iterator[str]:
    """Serve collections and items by pgstac until the block ends; yields the address."""
    python = find_python()
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg: pip install 'geofm[postgres]'")
    server = urlsplit(postgres_url)
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        query = "SELECT 1 FROM pg_available_extensions WHERE name = 'postgis'"
        if connection.execute(query).fetchone() is None:
            pytest.skip("needs PostGIS (Debian: apt-get install postgresql-15-postgis-3)")
        connection.execute(f'CREATE DATABASE "{database}"')
    environment = {
        **os.environ, "PGHOST": str(server.hostname), "PGPORT": str(server.port),
        "PGUSER": str(server.username), "PGPASSWORD": "none", "PGDATABASE": database,
    }  # fmt: skip

    def tool(*words: object) -> None:
        command = [python.parent / "pypgstac", *map(str, words)]
        subprocess.run(command, check=True, env=environment, capture_output=True, cwd=tmp)

    tool("migrate")
    load(tool, "collections", collections, tmp)
    load(tool, "items", items, tmp)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp / f"{database}.log").open("wb")
    serve = ["-m", "uvicorn", "--factory", "stac_fastapi.pgstac.app:create_app", "--port", port]
    process = subprocess.Popen(
        [python, *map(str, serve)], env=environment, cwd=tmp, stdout=log, stderr=log
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                httpx.get(url + "/_mgmt/ping", timeout=1.0, trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def load(tool: Any, table: str, rows: Sequence[Json], tmp: Path) -> None:
    """Load rows into a table of the database."""
    file = tmp / f"{table}.ndjson"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool("load", table, file, "--method", "upsert")
