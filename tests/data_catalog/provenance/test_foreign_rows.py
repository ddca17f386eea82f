"""Sources and scores of an artifact that somebody else sealed: any shape, and each is a finding."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, now, open_catalogue
from data_catalog.database.schema import ArtifactRow
from data_catalog.errors import CheckError
from data_catalog.provenance.findings import LISTED
from data_catalog.provenance.verify import check_artifact, check_chain
from data_catalog.storage.reach import OutOfReach
from data_catalog.store import Store
from tests.data_catalog.provenance.test_foreign import entry, forge

SHAPES: list[Any] = [
    [{"source": "x"}], [{"source": "x", "licence": "y", "rows": "many"}],
    [{"source": "x", "licence": None, "rows": 1}], [{"source": {}, "licence": "y", "rows": 1}],
    [{"source": "x", "licence": "y", "rows": 2**70}],
    [{"source": "x", "licence": "y", "rows": 1, "attribution": 7}],
    [{"source": "x", "licence": "y", "rows": 1}] * 2, [1, 2.5], ["x"], [None], [[]], "planet",
    {"source": "x"}, None, 7, True,
]  # fmt: skip


def known(store: Store, database: Path, artifact: Artifact) -> Catalogue:
    """A catalogue that has the row of an artifact, and nothing else of it."""
    catalogue = open_catalogue(f"sqlite:///{database}", store)
    manifest = artifact.manifest
    with catalogue.session() as session:
        session.add(
            ArtifactRow(
                digest=artifact.digest, kind=manifest.kind, stage=manifest.stage, key="k",
                manifest=manifest.model_dump(mode="json"), created_at=now(),
            )
        )  # fmt: skip
    return catalogue


@pytest.mark.parametrize("sources", SHAPES, ids=repr)
def test_sources_of_another_shape_are_a_problem(store: Store, tmp_path: Path, sources: Any) -> None:
    artifact = forge(store, [entry("gone")], facts={"sources": sources})
    problems = check_chain(known(store, tmp_path / "c.db", artifact), artifact).problems
    assert [text for text in problems if "facts.sources" in text]
    assert [text for text in problems if "gone: missing" in text]
    with pytest.raises(CheckError, match=r"facts\.sources"):
        open_catalogue(f"sqlite:///{tmp_path}/new.db", store).record(artifact, "k")


def _table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pd.DataFrame(columns).to_parquet(path)


def _broken_footer(path: Path) -> None:
    _table(model=["m"])(path)
    data = bytearray(path.read_bytes())
    data[-40:-8] = bytes(32)
    path.write_bytes(data)


def _lists(path: Path) -> None:
    names = ["model", "feature", "task", "protocol", "metric", "value", "ci_low", "ci_high", "n"]
    pd.DataFrame({name: [[1, 2]] for name in [*names, "seed"]}).to_parquet(path)


@pytest.mark.parametrize(
    "write",
    [_broken_footer, _table(model=["m"]), _table(), _lists, lambda path: path.write_bytes(b""),
     lambda path: path.write_bytes(b"PAR1 nothing PAR1"), lambda path: None, Path.mkdir],
    ids=["footer", "one column", "no column", "lists", "empty", "no table", "missing", "folder"],
)  # fmt: skip
def test_a_table_of_scores_that_is_none_is_a_problem(
    store: Store, tmp_path: Path, write: Callable[[Path], object]
) -> None:
    artifact = forge(store, [entry("gone"), entry("scores.parquet")], kind="scores")
    write(Path(artifact.root.path, "scores.parquet"))
    found = check_chain(known(store, tmp_path / "c.db", artifact), artifact)
    assert [text for text in found.problems if text.startswith("catalogue: scores")]
    assert [text for text in found.problems if "gone: missing" in text]
    assert not found.unread


def test_scores_out_of_reach_are_no_problem(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = forge(store, [entry("gone")], kind="scores")

    def away(*_: object) -> None:
        raise OutOfReach("scores.parquet could not be read")

    monkeypatch.setattr(Artifact, "table", away)
    found = check_chain(known(store, tmp_path / "c.db", artifact), artifact)
    assert [text for text in found.unread if "scores.parquet" in text]
    assert [text for text in found.problems if "gone: missing" in text]


def test_many_foreign_files_hide_no_sealed_file(store: Store) -> None:
    artifact = forge(store, [entry("inner/data.bin"), entry("inner/deep/data.bin")])
    root = Path(artifact.root.path)
    (root / "inner" / "deep").mkdir(parents=True)
    for name in ("inner/data.bin", "inner/deep/data.bin"):
        (root / name).write_bytes(b"data")
    first = root / "foreign"
    first.touch()
    for number in range(10_050):
        os.link(first, root / f"foreign-{number}")
    problems = check_artifact(artifact).problems
    assert not [text for text in problems if "missing" in text]
    assert len(problems) == LISTED + 1
    assert "10,001 more" in problems[-1]
