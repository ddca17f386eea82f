"""A chain is that of the manifests: what the catalogue says otherwise is found, never believed."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import event

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.errors import CheckError
from data_catalog.manifest import FileEntry, Manifest
from data_catalog.provenance.lineage import ancestry, walk_lineage
from data_catalog.provenance.verify import verify_chain
from data_catalog.run import run_stage
from data_catalog.stage import Sealed, Stage, no_parts, no_work
from data_catalog.store import Store, list_files
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings


def _write(job, parts, out):
    (out / "all.txt").write_text("all")
    facts = {"sources": [{"source": "planet", "licence": "CC0-1.0", "rows": 6}]}
    return Sealed({"rows_in": 6, "rows_out": 6}, facts=facts)


PACKED = Stage("pack", "1", "dataset", ("items", "chips"), (), no_parts, no_work, _write)


class Chain(NamedTuple):
    """Numbers, their squares, and a dataset made from both."""

    items: Artifact
    chips: Artifact
    dataset: Artifact
    catalogue: Catalogue
    database: Path


@pytest.fixture
def chain(store: Store, tmp_path: Path) -> Chain:
    database = tmp_path / "catalogue.db"
    catalogue = open_catalogue(f"sqlite:///{database}", store)
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    chips = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    dataset = run_stage(PACKED, store, catalogue, {"items": items, "chips": chips}, Settings())
    catalogue.publish("corpus", dataset, "2026-11-30")
    return Chain(items, chips, dataset, catalogue, database)


def alter(chain: Chain, statement: str, **values: str) -> list[str]:
    """Change the catalogue behind its back; the problems that a deep verification then finds."""
    with sqlite3.connect(chain.database) as connection:
        names = {"items": chain.items.digest, "chips": chain.chips.digest,
                 "dataset": chain.dataset.digest, **values}  # fmt: skip
        assert connection.execute(statement, names).rowcount > 0
    connection.close()
    return verify_chain(chain.catalogue, chain.dataset)


def test_a_whole_chain_has_no_problem(chain: Chain) -> None:
    assert verify_chain(chain.catalogue, chain.dataset) == []


def test_deleted_edges_and_ancestors_are_both_found(chain: Chain) -> None:
    for artifact in (chain.items, chain.chips):
        shutil.rmtree(artifact.root.path)
    problems = alter(chain, "delete from edge")
    for role, artifact in (("items", chain.items), ("chips", chain.chips)):
        missing = f"its input {role} {artifact.digest} is not in the store"
        assert [p for p in problems if missing in p]
        assert [p for p in problems if f"lacks the edge to its input {role}" in p]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("delete from edge where child = :dataset and role = 'chips'", "lacks the edge"),
        ("update edge set parent = :items where child = :dataset and role = 'chips'",
         "its manifest has"),
        ("update edge set parent = :dataset where child = :chips", "its manifest has"),
        ("update edge set role = 'other' where child = :chips", "its manifest has none"),
        ("update artifact set kind = 'model' where digest = :chips", "has kind 'model'"),
        ("update artifact set stage = 'other' where digest = :items", "has stage 'other'"),
        ("update artifact set manifest = replace(manifest, '\"seed\": 0', '\"seed\": 1') "
         "where digest = :chips", "has another manifest"),
        ("update artifact set manifest = '{' where digest = :chips", "is damaged"),
        ("update artifact set manifest = '{}' where digest = :chips", "has another manifest"),
        ("delete from artifact where digest = :chips", "has no row"),
        ("update source set licence = 'CC-BY-4.0' where artifact = :dataset", "other sources"),
        ("delete from source where artifact = :dataset", "other sources"),
        ("update name set digest = :items", "of kind items"),
        ("update name set digest = 'ab'", "which has no row"),
    ],
)  # fmt: skip
def test_what_contradicts_a_manifest_is_named(chain: Chain, statement: str, expected: str) -> None:
    problems = alter(chain, statement)
    assert [problem for problem in problems if expected in problem], problems


def test_a_missing_row_of_a_name_is_damage(chain: Chain) -> None:
    alter(chain, "update name set digest = 'ab'")
    with pytest.raises(CheckError, match="which has no row"):
        chain.catalogue.resolve("corpus")


def test_an_undecodable_row_is_damage(chain: Chain) -> None:
    alter(chain, "update artifact set manifest = '{' where digest = :chips")
    with pytest.raises(CheckError, match="a row cannot be read"):
        chain.catalogue.artifacts()


def test_a_missing_ancestor_is_named_with_its_role(chain: Chain) -> None:
    shutil.rmtree(chain.items.root.path)
    problems = verify_chain(chain.catalogue, chain.dataset)
    assert [p for p in problems if f"its input items {chain.items.digest}" in p]


def test_an_ancestor_is_verified_whatever_kind_the_catalogue_gives_it(chain: Chain) -> None:
    chain.items.path("numbers.json").write_bytes(b"[]")
    problems = alter(chain, "update artifact set kind = 'dataset' where digest = :items")
    assert [p for p in problems if "numbers.json" in p]


@pytest.mark.parametrize("edges", [("dataset", "dataset"), ("items", "dataset")])
def test_a_cycle_of_edges_ends(chain: Chain, edges: tuple[str, str]) -> None:
    problems = alter(chain, f"insert into edge values (:{edges[0]}, 'loop', :{edges[1]})")
    assert [p for p in problems if "has an edge to loop" in p]
    assert len(list(walk_lineage(ancestry(chain.catalogue, chain.dataset)))) == 3


def test_each_artifact_of_a_lineage_is_read_once(store: Store, tmp_path: Path) -> None:
    """Of a ladder, where each artifact is made from the two before it."""
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/ladder.db", store)
    made: list[Artifact] = []
    for number in range(30):
        with store.staging() as folder:
            out = folder / "artifact"
            out.mkdir()
            (out / "number.txt").write_text(str(number))
            files: list[FileEntry] = list_files(out)
            inputs = {f"before{n}": a.digest for n, a in enumerate(made[-2:])}
            manifest = Manifest(
                kind="chips", stage="cut", version="1", inputs=inputs, settings={}, seed=0,
                software={}, counts={}, dropped={}, facts={}, deterministic=True, files=files,
            )  # fmt: skip
            made.append(store.publish(out, manifest))
        catalogue.record(made[-1], f"{number:064d}")
    read: list[str] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "FROM artifact" in statement:
            read.extend(parameters)

    event.listen(catalogue.engine, "before_cursor_execute", note)
    nodes = list(walk_lineage(ancestry(catalogue, made[-1])))
    event.remove(catalogue.engine, "before_cursor_execute", note)
    assert len(nodes) == len(read) == 30
    assert set(read) == {artifact.digest for artifact in made}
    assert {node.artifact.digest for node in nodes} == {artifact.digest for artifact in made}
    assert verify_chain(catalogue, made[-1]) == []
