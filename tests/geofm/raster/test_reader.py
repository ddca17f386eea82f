from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rasterio.windows import Window

from geofm.raster.reader import Raster, fetch, open_raster
from geofm.remote import url_policy
from geofm.remote.assets import HttpAsset, S3Asset
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access, Signing, check_host, is_public, locate
from tests.geofm.remote.seen import watch
from tests.geofm.stac.small_world import World, serve, texture, tiff

PIXELS = texture(256, 256)
DATA = tiff(PIXELS)
ALL = Window(0, 0, 256, 256)


@contextmanager
def open_asset(
    href: str, access: Access, declared_sha256: str = "", whole: bool = True
) -> Iterator[Raster]:
    fetched = fetch(href, access, Signing(), whole)
    with open_raster(fetched, href, declared_sha256) as raster:
        yield raster


def reader(world: World, **change: object) -> Access:
    return Access(**{"stac": world.url, "retries": 3, "timeout_s": 5.0, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [True, False])
def test_pixels_come_whole_or_by_range(world: World, whole: bool) -> None:
    href = world.add("/red.tif", DATA)
    sha256 = hashlib.sha256(DATA).hexdigest()
    with open_asset(href, reader(world), declared_sha256=sha256, whole=whole) as raster:
        assert np.array_equal(raster.read(1, ALL), PIXELS)
        assert raster.fetched.sha256 == sha256
        assert raster.fetched.sha256_from == ("computed" if whole else "declared")
        assert raster.fetched.size == len(DATA)


def test_large_files_are_read_by_range(world: World) -> None:
    href = world.add("/red.tif", DATA)
    with open_asset(href, reader(world, whole_max=1000)) as raster:
        assert np.array_equal(raster.read(1, Window(30, 50, 40, 9)), PIXELS[50:59, 30:70])
        assert (raster.fetched.sha256, raster.fetched.etag) == ("", '"1"')


@pytest.mark.parametrize("whole", [True, False])
def test_a_vrt_that_is_called_tif_reads_no_local_file(
    world: World, tmp_path: Path, whole: bool
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100)
    leak = f"""<VRTDataset rasterXSize="16" rasterYSize="16"><VRTRasterBand dataType="Byte" band="1"
    subClass="VRTRawRasterBand"><SourceFilename>{secret}</SourceFilename></VRTRasterBand>
    </VRTDataset>"""
    href = world.add("/red.tif", leak.encode())
    with (
        pytest.raises(Quarantine, match="not_a_tiff"),
        open_asset(href, reader(world), whole=whole),
    ):
        pytest.fail("a VRT was opened")


def test_pages_are_told_from_rasters(world: World) -> None:
    href = world.add("/red.tif", b"<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(Quarantine, match="an HTML page"), open_asset(href, reader(world)):
        pytest.fail("a page was opened")


@pytest.mark.parametrize("whole", [True, False])
def test_a_truncated_file_is_told_when_its_pixels_are_read(world: World, whole: bool) -> None:
    href = world.add("/red.tif", DATA[: len(DATA) // 2])
    with open_asset(href, reader(world), whole=whole) as raster:
        with pytest.raises(Quarantine) as caught:
            raster.read(1, ALL)
        assert (caught.value.reason, caught.value.passing) == ("truncated", False)


def test_a_wrong_checksum(world: World) -> None:
    href = world.add("/red.tif", DATA)
    with (
        pytest.raises(Quarantine, match="wrong_checksum"),
        open_asset(href, reader(world), declared_sha256="0" * 64),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize("whole", [True, False])
def test_passing_faults_are_retried_and_leave_no_trace(world: World, whole: bool) -> None:
    href = world.add("/red.tif", DATA)
    world.faults["/red.tif"] += [503, "cut", 429]
    with open_asset(href, reader(world), whole=whole) as raster:
        assert np.array_equal(raster.read(1, ALL), PIXELS)
    assert world.asked.count("/red.tif") >= 4


def test_faults_that_stay_are_an_answer(world: World) -> None:
    href = world.add("/red.tif", DATA)
    world.faults["/red.tif"] += [503] * 9
    with pytest.raises(Quarantine) as caught, open_asset(href, reader(world, retries=1)):
        pytest.fail("opened")
    assert (caught.value.reason, caught.value.passing) == ("unreachable", True)
    with (
        pytest.raises(Quarantine, match="not_found"),
        open_asset(f"{world.url}/nothing.tif", reader(world)),
    ):
        pytest.fail("opened")


def test_a_fault_amid_reading_is_not_taken_for_damage(world: World) -> None:
    big = texture(1024, 1024)
    href = world.add("/big.tif", tiff(big))
    with open_asset(href, reader(world, retries=0), whole=False) as raster:
        world.faults["/big.tif"] += [503]
        with pytest.raises(Quarantine, match="unreachable"):
            raster.read(1, Window(900, 900, 100, 100))


def test_loopback_and_private_hosts_are_refused(world: World) -> None:
    access = reader(world)
    for href in (
        "http://127.0.0.1:9/x.tif", "http://localhost/x.tif", "http://[::1]:1/x.tif",
        "http://10.0.0.1/x.tif", "http://169.254.169.254/latest", "http://0x7f000001/x.tif",
        "http://[::ffff:127.0.0.1]/x.tif",
    ):  # fmt: skip
        with pytest.raises(Quarantine, match="host_refused"):
            check_host(href, access)
    check_host(world.url + "/x.tif", access)  # the catalogue's own origin


def test_an_allow_list_is_all_that_counts(world: World) -> None:
    access = reader(world, allow_hosts=("data.example", "*.tiles.example", "127.0.0.1:9"))
    for good in ("https://data.example/a", "https://x.tiles.example/a", "http://127.0.0.1:9/a"):
        assert locate(good, access) == good
    for bad in (world.url, "https://evil.example/a", "s3://bucket/a"):
        with pytest.raises(Quarantine, match="host_refused"):
            locate(bad, access)
    assert locate("s3://b/a", reader(world, allow_hosts=("s3://b",))) == "s3://b/a"


@pytest.mark.parametrize("href", ["file:///etc/passwd", "/etc/passwd", "/vsizip//x", "gs://b/x"])
def test_only_http_and_s3_are_read(world: World, href: str) -> None:
    with pytest.raises(Quarantine, match="bad_scheme"):
        locate(href, reader(world))


def test_public_addresses() -> None:
    assert is_public("8.8.8.8")
    assert not any(map(is_public, ("192.168.1.1", "::ffff:10.0.0.1", "fe80::1%eth0", "224.0.0.1")))


def test_redirects_are_followed_only_where_the_policy_allows(world: World) -> None:
    world.add("/real.tif", DATA)
    world.redirects["/moved.tif"] = "/real.tif"
    with open_asset(world.url + "/moved.tif", reader(world)) as raster:
        assert raster.fetched.size == len(DATA)
    with serve() as other:
        world.redirects["/out.tif"] = other.add("/private.tif", DATA)
        with (
            pytest.raises(Quarantine, match="host_refused"),
            open_asset(world.url + "/out.tif", reader(world)),
        ):
            pytest.fail("followed to a private host")
        assert other.asked == []
    world.redirects["/loop.tif"] = "/loop.tif"
    with (
        pytest.raises(Quarantine, match="too_many_redirects"),
        open_asset(world.url + "/loop.tif", reader(world)),
    ):
        pytest.fail("opened")


def test_what_is_refused_is_signed(world: World) -> None:
    href = world.add("/red.tif", DATA)
    world.add("/sign", json.dumps({"href": href + "?token=1"}).encode())
    world.faults["/red.tif"] += [403]
    asset = HttpAsset(href, reader(world), Signing("{api}/sign?href={href}"))
    piece = asset.whole(10**7)
    assert piece is not None
    assert piece.data == DATA
    world.add("/sign", json.dumps({"href": "http://evil.example/red.tif"}).encode())
    world.faults["/red.tif"] += [403]
    with pytest.raises(Quarantine, match="forbidden"):
        HttpAsset(href, reader(world), Signing("{api}/sign?href={href}")).whole(10**7)


def test_the_planet_is_found_by_its_variable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("/assets/red.tif", DATA)
    monkeypatch.setenv(url_policy.PLANET_ENV, world.url)
    with open_asset("planet:/assets/red.tif", Access(stac="planet")) as raster:
        assert np.array_equal(raster.read(1, ALL), PIXELS)
    with pytest.raises(Quarantine, match="bad_scheme"):
        locate("planet:/assets/red.tif", reader(world))


def test_buckets_that_cannot_be_read_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    access = Access(stac="http://example.com", retries=0, credentials_for=("bucket",))
    with pytest.raises(Quarantine, match="forbidden"):
        S3Asset("s3://bucket/red.tif", access).whole(10)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    with pytest.raises(Quarantine, match="unreachable"):
        S3Asset("s3://bucket/red.tif", access).part(0, 10)


def test_an_endpoint_without_ranges_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(stac="http://example.com", retries=3)
    with watch() as seen:
        about = {"etag": '"e"', "last-modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        seen.answers["/bucket/red.tif"] = (200, about, b"0123456789")
        monkeypatch.setenv("AWS_ENDPOINT_URL", seen.url)
        monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
        with pytest.raises(Quarantine, match="no_ranges"):
            S3Asset("s3://bucket/red.tif", access).part(0, 5)
    assert seen.paths == ["/bucket/red.tif"]
