"""An artifact that somebody else made: nothing outside it is read, written or waited for."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError
from data_catalog.hashing import canonical
from data_catalog.manifest import Manifest, safe_name
from data_catalog.provenance.findings import LISTED
from data_catalog.provenance.verify import check_artifact, verify_artifact
from data_catalog.storage.export import exported_copy
from data_catalog.store import Store

#: Paths that mean something else than a file inside an artifact, on some system.
BAD_NAMES = [
    "../evil.txt", "a/../../evil.txt", "/etc/hostname", "//etc/hostname", "", ".", "..", "a/.",
    "./a", "a//b", "a/", "a\\b", "..\\evil", "C:/evil", "c:evil", "a\0b", "a\nb", "\x1b[31m",
    "a\x7fb", "/".join("a" * 40), "n" * 300, "\ud800",
]  # fmt: skip


def forge(store: Store, files: list[dict[str, Any]], **more: Any) -> Artifact:
    """An artifact whose manifest says what a stranger likes, in the folder of its digest."""
    manifest = {
        "format": "geofm/1", "kind": "dataset", "stage": "pack", "version": "1", "inputs": {},
        "settings": {}, "seed": 0, "software": {}, "counts": {}, "dropped": {}, "facts": {},
        "deterministic": True, "files": files, **more,
    }  # fmt: skip
    data = canonical(manifest)
    artifact = store.artifact("dataset", hashlib.sha256(data).hexdigest())
    Path(artifact.root.path).mkdir(parents=True)
    Path(artifact.root.path, "manifest.json").write_bytes(data)
    return artifact


def entry(path: str, data: bytes = b"data") -> dict[str, Any]:
    return {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_path_that_leads_elsewhere_is_refused_everywhere(
    store: Store, tmp_path: Path, name: str
) -> None:
    artifact = forge(store, [entry(name)])
    for read in (artifact.path, artifact.local, lambda n: artifact.read_range(n, 0, 1)):
        with pytest.raises(CheckError, match="not a path of a file in an artifact"):
            read(name)
    assert verify_artifact(artifact)
    with pytest.raises(CheckError), exported_copy(artifact, tmp_path / "out" / "copy"):
        pass
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil.txt").exists()


@given(st.text(min_size=1, max_size=40))
def test_a_safe_name_stays_inside(name: str) -> None:
    try:
        safe_name(name)
    except ValueError:
        return
    assert os.path.normpath(f"/top/{name}") == f"/top/{name}"
    assert "\\" not in name


@pytest.mark.parametrize(
    "files",
    [
        [entry("a"), entry("a")],
        [entry("a"), entry("A")],
        [entry("é"), entry("e\u0301")],
        [entry("a"), entry("a/b")],
        [entry("manifest.json")],
        [entry("Manifest.JSON")],
        [entry("a") | {"size": -1}],
        [entry("a") | {"size": 2**63}],
        [entry("a") | {"sha256": "abc"}],
        [entry("a") | {"sha256": "../" * 20 + "abcd"}],
        [{"path": "a"}],
        [3],
        {},
    ],
)
def test_a_list_of_files_that_contradicts_itself_is_refused(store: Store, files: Any) -> None:
    artifact = forge(store, files)
    assert verify_artifact(artifact)
    with pytest.raises(CheckError, match=r"manifest.json is damaged"):
        _ = artifact.manifest


@pytest.mark.parametrize("kind", ["a[/]b", "../../x", "", "A", "a" * 40, "a\n", "a/b"])
def test_a_kind_is_the_name_of_a_folder(store: Store, kind: str) -> None:
    with pytest.raises(CheckError):
        store.artifact(kind, "ab" * 32)
    assert verify_artifact(forge(store, [], kind=kind))


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = {
    "link to the same bytes": _replace(lambda p: p.symlink_to(p.parents[4] / "outside")),
    "link to nothing": _replace(lambda p: p.symlink_to("nowhere")),
    "endless link": _replace(lambda p: p.symlink_to(p.name)),
    "link to a device": _replace(lambda p: p.symlink_to("/dev/zero")),
    "named pipe": _replace(os.mkfifo),
    "socket": _replace(_socket),
    "folder": _replace(lambda p: p.mkdir()),
}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("name", ["data.bin", "manifest.json"])
def test_nothing_but_a_file_is_opened(store: Store, tmp_path: Path, what: str, name: str) -> None:
    (store.local_root / "outside").write_bytes(b"data")
    artifact = forge(store, [entry("data.bin")])
    Path(artifact.root.path, "data.bin").write_bytes(b"data")
    assert verify_artifact(artifact) == []
    manifest = artifact.manifest
    SPECIAL[what](Path(artifact.root.path, name))
    fresh = Artifact(artifact.url)
    problems = verify_artifact(fresh, manifest)
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(CheckError):
        fresh.read_range(name, 0, 1)
    with pytest.raises(CheckError):
        fresh.local(name)
    with pytest.raises(CheckError), exported_copy(fresh, tmp_path / "copy"):
        pass
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_is_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data.bin").write_bytes(b"data")
    artifact = forge(store, [entry("inner/data.bin")])
    Path(artifact.root.path, "inner").symlink_to(tmp_path / "elsewhere")
    assert verify_artifact(artifact)
    with pytest.raises(CheckError, match="symbolic link"):
        artifact.local("inner/data.bin")
    whole = forge(store, [entry("data.bin")])
    Path(whole.root.path, "data.bin").write_bytes(b"data")
    assert verify_artifact(whole) == []
    Path(whole.root.path).rename(tmp_path / "moved")
    Path(whole.root.path).symlink_to(tmp_path / "moved")
    assert any("symbolic link" in problem for problem in verify_artifact(Artifact(whole.url)))


def test_everything_that_is_too_much_is_named(store: Store, tmp_path: Path) -> None:
    artifact = forge(store, [entry("inner/data.bin")])
    root = Path(artifact.root.path)
    (root / "inner").mkdir()
    (root / "inner" / "data.bin").write_bytes(b"data")
    assert verify_artifact(artifact) == []
    (root / "empty").mkdir()
    (root / "linked").symlink_to(tmp_path)
    (root / "inner" / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    problems = verify_artifact(artifact)
    for name in ("empty", "linked", "inner/dangling", "pipe"):
        assert [p for p in problems if f"{name} (" in p and "not in the manifest" in p], name
    assert len(problems) == 4


def test_sizes_that_lie_are_found(store: Store) -> None:
    artifact = forge(store, [entry("a") | {"size": 2**62}, entry("b") | {"size": 3}])
    for name in ("a", "b"):
        Path(artifact.root.path, name).write_bytes(b"data")
    assert [("instead of" in problem) for problem in verify_artifact(artifact)] == [True, True]
    for offset, size in ((-1, 2), (0, -1), (0, 2**40), (2**62, 1)):
        with pytest.raises(CheckError):
            artifact.read_range("a", offset, size)


def test_a_manifest_of_many_files_is_answered_in_bounded_words(store: Store) -> None:
    some = entry("x")
    artifact = forge(store, [some | {"path": f"f{number}"} for number in range(20_000)])
    found = check_artifact(artifact)
    assert len(found.problems) == LISTED + 1
    assert "19,950 more" in found.problems[-1]


@pytest.mark.parametrize("depth", [300, 50_000])
def test_deep_json_is_one_clear_error(store: Store, depth: int) -> None:
    artifact = forge(store, [])
    Path(artifact.root.path, "deep.json").write_bytes(b"[" * depth * 4 + b"]" * depth * 4)
    if depth > 1000:
        with pytest.raises(CheckError, match="is not JSON"):
            artifact.json("deep.json")
    settings = b'{"a":' * depth + b"1" + b"}" * depth
    text = Path(artifact.root.path, "manifest.json").read_bytes()
    text = text.replace(b'"settings":{}', b'"settings":' + settings)
    Path(artifact.root.path, "manifest.json").write_bytes(text)
    assert verify_artifact(Artifact(artifact.url))
    with pytest.raises(CheckError, match="damaged"):
        _ = Artifact(artifact.url).manifest


def test_a_manifest_that_is_too_large_is_not_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = forge(store, [])
    path = Path(artifact.root.path, "manifest.json")
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    problems = verify_artifact(Artifact(artifact.url))
    assert len(problems) == 1
    assert "and a manifest has at most" in problems[0]


def test_what_geofm_seals_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="not a path of a file"):
        Manifest.model_validate(
            {"kind": "items", "stage": "search", "version": "1", "inputs": {}, "settings": {},
             "seed": 0, "software": {}, "counts": {}, "dropped": {}, "facts": {},
             "deterministic": True, "files": [entry("../x")]}
        )  # fmt: skip
