"""Reports open in a browser with the password, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.manifest import Manifest
from data_catalog.store import Store, list_files
from flows.service.pages import make_app
from flows.settings import PAGES, report_address

SECRET = ("geofm", "a-long-random-text-of-a-home")


def seal(store: Store, catalogue: Catalogue, kind: str, **files: bytes) -> Artifact:
    """Publish an artifact with some files, named without the dot."""
    with store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        for name, content in files.items():
            (out / name.replace("_", ".")).write_bytes(content)
        manifest = Manifest(
            kind=kind, stage=kind, version="1", inputs={}, settings={}, seed=0, software={},
            counts={"rows_in": 1, "rows_out": 1}, dropped={}, facts={}, deterministic=True,
            files=list_files(out),
        )  # fmt: skip
        artifact = store.publish(out, manifest)
    catalogue.record(artifact, "key")
    return artifact


@pytest.fixture
def report(store: Store, catalogue: Catalogue) -> Artifact:
    page = b"<!doctype html><title>A report</title>"
    return seal(store, catalogue, "report", report_html=page, kept_png=b"\x89PNG", notes_txt=b"x")


@pytest.fixture
def browser(catalogue: Catalogue) -> TestClient:
    return TestClient(make_app(catalogue, ":".join(SECRET)), follow_redirects=False)


def test_a_report_opens_with_the_password(browser: TestClient, report: Artifact) -> None:
    place = f"/reports/{report.digest}/report.html"
    for given in (None, ("geofm", "guess"), ("", SECRET[1])):
        asked = browser.get(place, auth=given)
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"].startswith("Basic ")
        assert b"A report" not in asked.content
    page = browser.get(place, auth=SECRET)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"A report" in page.content
    assert "default-src 'none'" in page.headers["content-security-policy"]
    picture = browser.get(f"/reports/{report.digest}/kept.png", auth=SECRET)
    assert picture.headers["content-type"] == "image/png"
    assert place in browser.get(f"/reports/{report.digest}", auth=SECRET).headers["location"]
    assert f"reports/{report.digest}/report.html" in browser.get("/", auth=SECRET).text


def test_nothing_else_is_served(
    browser: TestClient, report: Artifact, store: Store, catalogue: Catalogue
) -> None:
    other = seal(store, catalogue, "model", report_html=b"not a report")
    places = [
        f"/reports/{report.digest}/manifest.json",
        f"/reports/{report.digest}/notes.txt",
        f"/reports/{report.digest}/..%2F..%2Fcatalogue.db",
        f"/reports/{report.digest}/%2e%2e/{other.digest}/report.html",
        f"/reports/{other.digest}/report.html",
        f"/reports/{'0' * 64}/report.html",
        f"/reports/{report.digest[:12]}/report.html",
        "/reports/..%2F..%2F/report.html", "/docs", "/openapi.json", "/catalogue.db",
    ]  # fmt: skip
    for place in places:
        assert browser.get(place, auth=SECRET).status_code == 404, place
        assert browser.get(place).status_code == 401, place
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert browser.request(method, "/", auth=SECRET).status_code == 405


def test_a_damaged_page_is_not_served(
    browser: TestClient, report: Artifact, tmp_path: Path
) -> None:
    file = report.local("report.html")
    file.unlink()
    assert browser.get(f"/reports/{report.digest}/report.html", auth=SECRET).status_code == 404
    file.symlink_to("/etc/hostname")
    assert browser.get(f"/reports/{report.digest}/report.html", auth=SECRET).status_code == 404


def test_a_run_links_to_its_report_where_pages_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PAGES, raising=False)
    assert report_address("a" * 64) == ""
    monkeypatch.setenv(PAGES, "http://127.0.0.1:4300")
    assert report_address("a" * 64) == f"http://127.0.0.1:4300/reports/{'a' * 64}/report.html"
