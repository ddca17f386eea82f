"""The record half of the page: what was asked, where everything came from, what was set aside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_catalog.artifact import Artifact
from geofm.config.recipe import Recipe
from geofm.reporting import lineage
from geofm.reporting.blocks import Facts, Fold, Graph, Note, Plain, Section, Table
from geofm.reporting.report_data import Material
from geofm.runtime import text as words
from geofm.runtime.text import count, each, plain
from geofm.stages import section_of

#: What the page is made from, by role, first made first.
ROLES = (
    "items", "chips", "embeddings", "descriptors", "pool", "calibration", "buckets", "pairs",
    "alike", "decisions", "dataset", "model", "scores",
)  # fmt: skip
MOST_ROWS = 100
MOST_FACT = 320


def asked(material: Material) -> Section:
    """The settings: those that differ from the defaults, then all."""
    usual = Recipe().model_dump(mode="json")
    about = {
        f"{name}.{field}": info.description or ""
        for name, section in Recipe.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for field, info in section.annotation.model_fields.items()  # type: ignore[union-attr]
    }
    chosen, everything = {}, {}
    for role in ROLES:
        if role not in material.artifacts:
            continue
        section = section_of(material.artifacts[role].manifest.stage)
        for name, value in material.settings(role).items():
            full = f"{section}.{name}"  # stages may share a section, and fields of it
            everything[full] = (full, plain(value), about.get(full, ""))
            if value != usual.get(section, {}).get(name):
                chosen[full] = everything[full]
    seeds = sorted({a.manifest.seed for a in material.artifacts.values()})
    lead = (
        f"{len(chosen)} of {len(everything)} settings differ from the defaults; "
        f"seed {seeds[-1] if seeds else 0}."
    )
    head = ("Setting", "Value", "What it is")
    look = {"names": frozenset({0}), "code": frozenset({1})}
    blocks: list[Plain | Fold] = []
    if chosen:
        blocks.append(Table(head, list(chosen.values()), **look))
    whole = Table(head, list(everything.values()), **look)
    blocks.append(Fold(f"All {len(everything)} settings", [whole]))
    return Section("asked", "What was asked", lead, blocks)


def origin(material: Material) -> Section:
    """The chain of digests, the licences and the certificates."""
    found = licences(material)
    sources = sorted({row[0] for row in found})
    blocks: list[Plain | Fold] = [
        Graph(
            lineage.draw(material.artifacts, sources),
            "Each box is a sealed artifact, named by the first digits of its digest; dashed boxes "
            "come from outside.",
        )
    ]
    rows = []
    for role in reversed(ROLES):
        if role in material.artifacts:
            manifest = material.artifacts[role].manifest
            parents = ", ".join(f"{r} {d[:12]}" for r, d in manifest.inputs.items())
            rows.append(
                (
                    role, material.artifacts[role].digest, parents or "the sources",
                    count(manifest.counts.get("rows_out", 0)),
                    "yes" if manifest.deterministic else "no",
                )
            )  # fmt: skip
    head = ("Artifact", "Digest (sha256)", "Made from", "Rows", "Bit-reproducible")
    blocks.append(Table(head, rows, numeric=frozenset({3}), code=frozenset({1, 2})))
    blocks.append(
        Table(("Source", "Licence", "Kept chips", "Attribution"), found, numeric=frozenset({2}))
        if found
        else Note("No source is recorded for this dataset.")
    )
    blocks += _certificates(material)
    software = _software(material.artifacts.values())
    blocks.append(Fold("Software", [Facts("", software)]))
    lead = (
        f"From {words.some(len(sources), 'source')} under "
        f"{words.some(len({row[1] for row in found}), 'licence')} to the scores, by digest. "
        "`geofm trace` follows a single sample, `geofm verify --deep` re-hashes the chain."
    )
    return Section("lineage", "Where everything came from", lead, blocks)


def licences(material: Material) -> list[tuple[str, str, str, str]]:
    """Source, licence, kept chips and attribution, as recorded or else from the scenes."""
    recorded = material.facts("dataset").get("sources", [])
    if recorded:
        return [
            (s["source"], s["licence"], count(s["rows"]), s.get("attribution") or "—")
            for s in recorded
        ]
    if "source" not in material.items or material.kept().empty:
        return []
    columns = material.items[["item_id", "source", "licence"]].drop_duplicates("item_id")
    joined = material.kept()[["item_id"]].merge(columns, on="item_id", how="left")
    sizes = joined.groupby(["source", "licence"]).size().reset_index(name="rows")
    return [(str(r.source), str(r.licence), count(r.rows), "—") for r in each(sizes)]


def _certificates(material: Material) -> Iterable[Facts]:
    for role, title in (
        ("embeddings", "Embeddings"),
        ("pairs", "Search for duplicates"),
        ("alike", "Search for the same view"),
        ("decisions", "Curation certificate"),
        ("dataset", "Dataset"),
        ("model", "Model"),
    ):
        pairs = _flat(material.facts(role))
        if pairs:
            yield Facts(title, pairs)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as names and values on one line each; nested ones get both names."""
    pairs: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "sources":
            continue
        words_of = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{words_of}: ")
        else:
            text = plain(value)
            pairs.append((words_of, text if len(text) <= MOST_FACT else text[:MOST_FACT] + "…"))
    return pairs


def _software(artifacts: Iterable[Artifact]) -> list[tuple[str, str]]:
    merged: dict[str, set[str]] = {}
    for artifact in artifacts:
        for name, version in artifact.manifest.software.items():
            merged.setdefault(name, set()).add(version)
    return [(name, ", ".join(sorted(versions))) for name, versions in sorted(merged.items())]


def quarantine(material: Material) -> Section:
    """What was set aside as unusable."""
    table = material.quarantine
    title = "Quarantine"
    if table.empty:
        return Section("quarantine", title, "Nothing was quarantined.")
    sizes = table.groupby("what", sort=False).size()
    told = ", ".join(words.some(int(n), str(what)) for what, n in sizes.items())
    lead = f"{told} could not be used. The run went on without them; each keeps its row."
    rows = [
        (str(r.what), _short(str(r.id)), _short(str(r.collection)), words.reason(str(r.reason)))
        for r in each(table.iloc[:MOST_ROWS])
    ]
    blocks: list[Plain] = [Table(("What", "Which", "Collection", "Why"), rows, code=frozenset({1}))]
    more = len(table) - len(rows)
    if more:
        blocks.append(
            Note(f"{count(more)} more are in items.parquet, chips.parquet, assets.parquet.")
        )
    return Section("quarantine", title, lead, blocks)


def _short(text: str, most: int = 120) -> str:
    """Names from outside can be of any length."""
    return text if len(text) <= most else text[:most] + "…"
