from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.formats.tar import DamagedTar, read_members, read_ranges, tar_size, write_tar

MEMBERS = [("a.npy", b"x" * 700), ("a.json", b"{}"), ("b.npy", b"y" * 512), ("b.json", b"")]


def test_members_are_where_the_writer_says(tmp_path: Path):
    path = tmp_path / "t.tar"
    written = write_tar(path, MEMBERS)
    whole = path.read_bytes()
    assert len(whole) == tar_size(len(data) for _, data in MEMBERS)
    for member, (name, data) in zip(written, MEMBERS, strict=True):
        assert member.name == name
        assert whole[member.offset : member.offset + member.size] == data
        assert member.sha256 == hashlib.sha256(data).hexdigest()
    ranges = [(member.offset, member.size) for member in written[::-1]]
    found = [bytes(data) for data in read_ranges(path, ranges)]
    assert found == [data for _, data in MEMBERS[::-1]]
    with path.open("rb") as file:
        assert [(name, data) for name, _, data in read_members(file)] == MEMBERS


def test_plain_tar_and_tarfile_read_it_and_see_no_owner_or_time(tmp_path: Path):
    path = tmp_path / "t.tar"
    write_tar(path, MEMBERS)
    listing = subprocess.run(
        ["tar", "-tvf", str(path), "--full-time"], capture_output=True, text=True, check=True,
        env={"TZ": "UTC", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert listing.stderr == ""
    assert "1970-01-01 00:00:00 a.npy" in listing.stdout
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
        assert [i.name for i in infos] == [name for name, _ in MEMBERS]
        assert {(i.uid, i.gid, i.mtime, i.mode) for i in infos} == {(0, 0, 0, 0o644)}


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 1600), max_size=5))
def test_same_members_same_bytes(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("tar")
    members = [(f"{n}.npy", bytes([n]) * size) for n, size in enumerate(sizes)]
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", iter(members))
    assert (folder / "a.tar").read_bytes() == (folder / "b.tar").read_bytes()
    with (folder / "a.tar").open("rb") as file:
        assert [(name, data) for name, _, data in read_members(file)] == members


def test_damage_is_refused(tmp_path: Path):
    path = tmp_path / "t.tar"
    written = write_tar(path, MEMBERS)
    whole = path.read_bytes()
    cases = {"truncated": whole[:900], "no tar header at byte 1536": whole[:1536] + b"?" * 512,
             "two blocks of zeros": whole + b"!", "not as written": b"b" + whole[1:]}  # fmt: skip
    for problem, data in cases.items():
        with pytest.raises(DamagedTar, match="checksum|header" if data[0] == 98 else problem):
            list(read_members(io.BytesIO(data)))
    path.write_bytes(whole[:900])
    with pytest.raises(DamagedTar, match="ends inside"):
        list(read_ranges(path, [(written[0].offset, written[0].size)]))
