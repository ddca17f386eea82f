"""Sections about the record: settings, lineage and licences, quarantine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from data_catalog.artifact import Artifact
from geofm.config.recipe import Recipe
from geofm.reporting.blocks import (
    Block,
    Collapsible,
    Diagram,
    FactList,
    Note,
    PageSection,
    Table,
)
from geofm.reporting.lineage_diagram import draw_lineage
from geofm.reporting.report_data import ROLES, ReportData
from geofm.runtime.text import count, each, plain, reason, some
from geofm.stages import section_of

#: Rows of the quarantine table.
MOST_ROWS = 100
#: Characters of a fact.
MOST_CHARACTERS = 320


def settings_section(data: ReportData) -> PageSection:
    """Settings that differ from the defaults, then all settings."""
    defaults = Recipe().model_dump(mode="json")
    descriptions = _setting_descriptions()
    changed, everything = {}, {}
    for role in ROLES:
        if role not in data.artifacts:
            continue
        section = section_of(data.artifacts[role].manifest.stage)
        for field, value in data.settings(role).items():
            name = f"{section}.{field}"  # several stages may share a section
            everything[name] = (name, plain(value), descriptions.get(name, ""))
            if value != defaults.get(section, {}).get(field):
                changed[name] = everything[name]
    seeds = sorted({artifact.manifest.seed for artifact in data.artifacts.values()})
    lead = (
        f"{len(changed)} of {len(everything)} settings differ from the defaults; "
        f"seed {seeds[-1] if seeds else 0}."
    )
    blocks: list[Block | Collapsible] = []
    if changed:
        blocks.append(_settings_table(list(changed.values())))
    all_settings = _settings_table(list(everything.values()))
    blocks.append(Collapsible(f"All {len(everything)} settings", [all_settings]))
    return PageSection("settings", "Settings", lead, blocks)


def _setting_descriptions() -> dict[str, str]:
    """Description of each field of the recipe, by section and field."""
    return {
        f"{name}.{field}": info.description or ""
        for name, section in Recipe.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for field, info in section.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def _settings_table(rows: list[tuple[str, str, str]]) -> Table:
    head = ("Setting", "Value", "Description")
    return Table(head, rows, names=frozenset({0}), code=frozenset({1}))


def lineage_section(data: ReportData) -> PageSection:
    """Digests of all artifacts, licences, certificates and software."""
    source_rows = licence_rows(data)
    sources = sorted({row[0] for row in source_rows})
    licences = {row[1] for row in source_rows}
    blocks: list[Block | Collapsible] = [
        Diagram(
            draw_lineage(data.artifacts, sources),
            "Each box is a sealed artifact with the first digits of its digest; dashed boxes "
            "come from outside.",
        ),
        _artifact_table(data),
    ]
    if source_rows:
        head = ("Source", "Licence", "Kept chips", "Attribution")
        blocks.append(Table(head, source_rows, numeric=frozenset({2})))
    else:
        blocks.append(Note("No source is recorded for this dataset."))
    blocks += _certificates(data)
    software = FactList("", _software_versions(data.artifacts.values()))
    blocks.append(Collapsible("Software", [software]))
    lead = (
        f"From {some(len(sources), 'source')} under {some(len(licences), 'licence')} to the "
        "scores, by digest. `geofm trace` follows a single sample, `geofm verify --deep` "
        "re-hashes the chain."
    )
    return PageSection("lineage", "Lineage", lead, blocks)


def _artifact_table(data: ReportData) -> Table:
    """Digest, inputs and size of each artifact, the last stage first."""
    head = ("Artifact", "Digest (sha256)", "Made from", "Rows", "Bit-reproducible")
    rows = []
    for role in reversed(ROLES):
        if role in data.artifacts:
            artifact = data.artifacts[role]
            manifest = artifact.manifest
            inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in manifest.inputs.items())
            rows.append(
                (
                    role,
                    artifact.digest,
                    inputs or "the sources",
                    count(manifest.counts.get("rows_out", 0)),
                    "yes" if manifest.deterministic else "no",
                )
            )
    return Table(head, rows, numeric=frozenset({3}), code=frozenset({1, 2}))


def licence_rows(data: ReportData) -> list[tuple[str, str, str, str]]:
    """Source, licence, kept chips and attribution, from the dataset or else from the scenes."""
    recorded = data.facts("dataset").get("sources", [])
    if recorded:
        return [
            (s["source"], s["licence"], count(s["rows"]), s.get("attribution") or "—")
            for s in recorded
        ]
    if "source" not in data.items or data.kept().empty:
        return []
    columns = data.items[["item_id", "source", "licence"]].drop_duplicates("item_id")
    joined = data.kept()[["item_id"]].merge(columns, on="item_id", how="left")
    sizes = joined.groupby(["source", "licence"]).size().reset_index(name="rows")
    return [(str(row.source), str(row.licence), count(row.rows), "—") for row in each(sizes)]


def _certificates(data: ReportData) -> Iterable[FactList]:
    """Facts in the manifests, by stage."""
    for role, title in (
        ("embeddings", "Embeddings"),
        ("pairs", "Search for duplicates"),
        ("alike", "Search for the same view"),
        ("decisions", "Curation certificate"),
        ("dataset", "Dataset"),
        ("model", "Model"),
    ):
        pairs = _flatten_facts(data.facts(role))
        if pairs:
            yield FactList(title, pairs)


def _flatten_facts(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as pairs of name and text; a nested fact has the names of its parents as a prefix."""
    pairs: list[tuple[str, str]] = []
    for key, value in facts.items():
        if key == "sources":
            continue
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict) and value:
            pairs += _flatten_facts(value, f"{name}: ")
        else:
            pairs.append((name, _shorten(plain(value), MOST_CHARACTERS)))
    return pairs


def _software_versions(artifacts: Iterable[Artifact]) -> list[tuple[str, str]]:
    """Versions of each package in all manifests."""
    merged: dict[str, set[str]] = {}
    for artifact in artifacts:
        for name, version in artifact.manifest.software.items():
            merged.setdefault(name, set()).add(version)
    return [(name, ", ".join(sorted(versions))) for name, versions in sorted(merged.items())]


def quarantine_section(data: ReportData) -> PageSection:
    """Scenes, chips and assets that could not be used."""
    table, title = data.quarantine, "Quarantine"
    if table.empty:
        return PageSection("quarantine", title, "Nothing was quarantined.")
    sizes = table.groupby("what", sort=False).size()
    counts = ", ".join(some(int(n), str(what)) for what, n in sizes.items())
    lead = f"{counts} could not be used. The run continued without them; each keeps its row."
    rows = [
        (
            str(row.what),
            _shorten(str(row.id)),
            _shorten(str(row.collection)),
            reason(str(row.reason)),
        )
        for row in each(table.iloc[:MOST_ROWS])
    ]
    blocks: list[Block] = [Table(("Kind", "Id", "Collection", "Reason"), rows, code=frozenset({1}))]
    more = len(table) - len(rows)
    if more:
        blocks.append(
            Note(f"{count(more)} more are in items.parquet, chips.parquet, assets.parquet.")
        )
    return PageSection("quarantine", title, lead, blocks)


def _shorten(text: str, most: int = 120) -> str:
    """Shorten a text; names from outside can have any length."""
    return text if len(text) <= most else text[:most] + "…"
