"""Bytes of S3 objects: obstore and s3fs give the same ones, and the same errors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from upath import UPath

from data_catalog.storage import s3 as objects
from tests.data_catalog.fault_proxy import FaultProxy, fault_proxy
from tests.geofm.remote.seen import watch

DATA = bytes(range(256)) * 40


@pytest.fixture(params=["obstore", "s3fs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which library moves the bytes."""
    if request.param == "s3fs":
        monkeypatch.setattr(objects, "_owner", -1)  # as in a forked process
    return str(request.param)


@pytest.fixture
def proxy(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with fault_proxy(tmp_path / "cache") as proxy:
        yield proxy


def connect(**options: Any) -> Any:
    return s3fs.S3FileSystem(skip_instance_cache=True, **options)


@pytest.mark.parametrize(
    "key", ["a/b.bin", "a b/ü#%20?x=1.bin", "a+b&c.bin", "pct%41.bin", "x//y.bin", "~t'()!.bin"]
)
def test_ranges_are_the_object_s_bytes_whatever_its_key(s3: str, way: str, key: str) -> None:
    files = connect()
    files.pipe_file(f"{s3}/keys/{key}", DATA)
    for start, end in ((0, 1), (10, 300), (0, len(DATA)), (len(DATA) - 5, len(DATA) + 100)):
        part = objects.read_object(files, f"{s3}/keys/{key}", start, end)
        assert part.data == DATA[start:end]
        assert part.total == len(DATA)
    with pytest.raises(objects.OutsideObject):
        objects.read_object(files, f"{s3}/keys/{key}", len(DATA), len(DATA) + 1)


def test_what_is_missing_or_forbidden_has_its_own_error(s3: str, way: str) -> None:
    connect().pipe_file(f"{s3}/errors.bin", DATA)
    for address in (f"{s3}/nothing.bin", "s3://no-such-bucket/x.bin"):
        with pytest.raises(FileNotFoundError):
            objects.read_object(connect(), address, 0, 10)
    for options in ({"key": "geofm-test", "secret": "wrong"}, {"anon": True}):
        with pytest.raises(PermissionError):
            objects.read_object(connect(**options), f"{s3}/errors.bin", 0, 10)
    away = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 0}}}
    with pytest.raises((OSError, EndpointConnectionError)) as caught:
        objects.read_object(connect(**away), f"{s3}/errors.bin", 0, 10)
    assert not isinstance(caught.value, PermissionError | FileNotFoundError)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("403 ExpiredToken", PermissionError),
        ("404 NoSuchKey", FileNotFoundError),
        ("500 InternalError", OSError),
        ("503 ServiceUnavailable", OSError),
        ("reset", OSError),
        ("cut", OSError),
    ],
)
def test_faults_of_a_server_have_the_errors_of_s3fs(
    s3: str, proxy: FaultProxy, fault: str, error: type[OSError]
) -> None:
    connect().pipe_file(f"{s3}/faults.bin", DATA)
    proxy.always(fault, "faults.bin")
    with pytest.raises(error) as caught:
        objects.read_object(connect(), f"{s3}/faults.bin", 0, 1000)
    assert error is not OSError or not isinstance(caught.value, PermissionError | FileNotFoundError)
    proxy.asked.clear()
    with pytest.raises(error):
        objects.read_object(connect(), f"{s3}/faults.bin", 0, 1000)
    assert len([path for _, path in proxy.asked if "faults.bin" in path]) == 1  # callers retry


def test_a_server_that_does_not_answer_is_given_up(s3: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        files = connect(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="error"):
            objects.read_object(files, f"{s3}/slow.bin", 0, 10, timeout_s=0.5)


def test_an_upload_is_the_file_and_replaces_what_was_there(
    s3: str, way: str, tmp_path: Path
) -> None:
    for size in (0, 10, 2 * objects.PART_BYTES + 17):
        (tmp_path / "file").write_bytes(os.urandom(size))
        target = UPath(f"{s3}/uploads/{way}.bin")
        objects.upload_file(tmp_path / "file", target)
        assert target.read_bytes() == (tmp_path / "file").read_bytes()
        assert target.stat().st_size == size


def test_an_upload_that_is_refused_names_the_address(s3: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"rows")
    target = UPath(f"{s3}/refused/x.bin", key="geofm-test", secret="wrong")
    with pytest.raises(PermissionError):
        objects.upload_file(tmp_path / "file", target)


def test_a_forked_process_reads_by_s3fs(s3: str) -> None:
    connect().pipe_file(f"{s3}/fork.bin", DATA)
    script = f"""
import os, signal
import s3fs
from data_catalog.storage.s3 import read_object
read = lambda: read_object(s3fs.S3FileSystem(), "{s3}/fork.bin", 3, 9).data
data = read()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if read() == data else 1)
print(os.waitpid(child, 0)[1], read() == data)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_a_profile_of_the_user_is_used(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect().pipe_file(f"{s3}/profile.bin", DATA)
    keys = [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]]
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-north-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert objects.read_object(connect(profile="lab"), f"{s3}/profile.bin", 0, 9).data == DATA[:9]
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert objects.read_object(connect(), f"{s3}/profile.bin", 0, 9).data == DATA[:9]
    monkeypatch.delenv("AWS_PROFILE")
    with pytest.raises(NoCredentialsError):
        objects.read_object(connect(endpoint_url="http://127.0.0.1:2"), f"{s3}/profile.bin", 0, 9)


def test_the_reader_of_a_bucket_pays_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    keys = {"key": "AKIAHUSH", "secret": "hush"}
    with watch() as seen:
        for pays in (True, False):
            seen.requests.clear()
            files = connect(endpoint_url=seen.url, requester_pays=pays, **keys)
            with pytest.raises(PermissionError):
                objects.read_object(files, "s3://mine/x.tif", 0, 9)
            headers = seen.requests[0][2]
            assert "AKIAHUSH" in headers["authorization"]
            assert headers.get("x-amz-request-payer") == ("requester" if pays else None)


def test_the_region_of_a_bucket_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Files:
        def call_s3(self, method: str, **arguments: str) -> Any:
            asked.append((method, arguments["Bucket"]))
            headers = {"x-amz-bucket-region": "us-west-2"}
            if arguments["Bucket"] == "mine":
                return {"ResponseMetadata": {"HTTPHeaders": headers}}
            error = PermissionError("forbidden")
            error.__cause__ = RuntimeError()
            response = {"ResponseMetadata": {"HTTPHeaders": headers}}
            error.__cause__.response = response  # type: ignore[attr-defined]
            raise error

    monkeypatch.setattr(objects, "_regions", {})
    for bucket in ("mine", "mine", "theirs", "theirs"):
        assert objects._region_of(Files(), bucket, "eu-central-1") == "us-west-2"
    assert asked == [("head_bucket", "mine"), ("head_bucket", "theirs")]


def test_a_region_that_was_not_named_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Files:
        up = False

        def call_s3(self, method: str, **arguments: str) -> Any:
            if not self.up:
                raise OSError("Service Unavailable")
            return {"ResponseMetadata": {"HTTPHeaders": {"x-amz-bucket-region": "us-west-2"}}}

    monkeypatch.setattr(objects, "_regions", {})
    files = Files()
    assert objects._region_of(files, "mine", "eu-central-1") == "eu-central-1"
    files.up = True
    assert objects._region_of(files, "mine", "eu-central-1") == "us-west-2"


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {}), (206, {}), (206, {"content-range": "bytes 0-8/*"})]
)
def test_a_server_without_ranges_has_its_own_error(
    way: str, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str]
) -> None:
    with watch() as seen:
        about = {"etag": '"e"', "last-modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        seen.answers["/mine/x.tif"] = (status, about | headers, DATA[:9])
        with pytest.raises(objects.NoRanges):
            objects.read_object(connect(endpoint_url=seen.url, anon=True), "s3://mine/x.tif", 0, 9)


def test_certificates_of_the_user_replace_the_public_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(url: str) -> object:
        objects._open_bucket.cache_clear()
        return objects._bucket(connect(endpoint_url=url, anon=True), "mine", 0, 1.0)

    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert store("https://127.0.0.1:1") is not None
    monkeypatch.setenv("AWS_CA_BUNDLE", certifi.where())
    assert store("https://127.0.0.1:1") is None  # s3fs; obstore would accept the public ones too
    assert store("http://127.0.0.1:1") is not None


#: Uploads a file and prints how many MiB of memory that took.
UPLOAD = """
import sys
from pathlib import Path
from upath import UPath
from data_catalog.storage.s3 import upload_file

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

target = UPath(sys.argv[2])
(target / "small").write_bytes(b"connected")
before = peak_mib()
upload_file(Path(sys.argv[1]), target / "large")
print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_an_upload_does_not_grow_with_the_file(s3: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        for _ in range(200):
            file.write(os.urandom(10**6))
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, tmp_path / "file", f"{s3}/memory"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 150
    assert connect().info(f"{s3}/memory/large")["size"] == 200 * 10**6
