"""Sections about curation: thresholds, survival by stratum, quality of the selection, leaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from geofm.reporting import plots
from geofm.reporting.blocks import Block, Note, PageSection, Plot, Table
from geofm.reporting.report_data import ReportData
from geofm.runtime.text import count, each, known, percent, some

#: Names of the selection and of the baselines it is compared with.
SELECTION_NAMES = {
    "kept": "this dataset",
    "random": "random choice",
    "balanced-kmeans": "balanced k-means",
}
#: Columns of the table of quality measures.
QUALITY_MEASURES = (
    "facility_location",
    "covering_radius",
    "spectral_log_volume",
    "cluster_gini",
)
#: Strata without kept chips that the section lists.
MOST_STRATA = 20


def curation_sections(data: ReportData) -> Iterable[PageSection]:
    """Make the sections about curation, in the order of the page."""
    yield thresholds_section(data)
    yield survival_section(data)
    yield selection_section(data)
    yield evaluation_sets_section(data)


def thresholds_section(data: ReportData) -> PageSection:
    """Duplicate threshold of each collection, and its calibration."""
    title = "Thresholds"
    thresholds: dict[str, dict[str, Any]] = data.facts("calibration").get("thresholds", {})
    if not thresholds:
        return PageSection("thresholds", title, "No threshold was calibrated.")
    head = ("Collection", "Cosine from", "Where it comes from", "Like pairs", "Unlike pairs")
    rows = [
        (
            name,
            f"{facts['threshold']:.4f}",
            f"{facts['source']}: {facts['reason']}",
            count(facts["positives"]),
            count(facts["negatives"]),
        )
        for name, facts in sorted(thresholds.items())
    ]
    blocks: list[Block] = [Table(head, rows, numeric=frozenset({1, 3, 4}))]
    curve = data.curve
    if len(curve):
        curve = curve[curve["class"] == "all"].dropna(subset=["precision"])
    if len(curve):
        chosen = {name: float(facts["threshold"]) for name, facts in thresholds.items()}
        caption = (
            "Pairs with a known truth: re-rendered and overlapping chips are duplicates, chips of "
            "other dates and of far regions are not."
        )
        blocks.append(Plot(plots.plot_calibration(curve, chosen), caption))
    lead = (
        "Cosine similarity from which two chips of this encoder and sensor are duplicates, "
        "measured on pairs whose truth follows from their metadata."
    )
    return PageSection("thresholds", title, lead, blocks)


def survival_section(data: ReportData) -> PageSection:
    """Share of candidates that the filters leave in each stratum."""
    title = "Effect of the filters by stratum"
    table = data.survival
    if table.empty:
        return PageSection("survival", title, "Nothing reached curation.")
    first_dimension = table[table["stratum_of"] == table["stratum_of"].iloc[0]]
    candidates = max(int(first_dimension["candidates"].sum()), 1)
    lead = f"{percent(first_dimension['kept'].sum() / candidates, 0)} of the candidates stay."
    emptied = table[(table["kept"] == 0) & (table["candidates"] > 0)]
    if len(emptied):
        lead += (
            f" {some(len(emptied), 'stratum')} lost every chip, which may show a bias of a filter."
        )
    else:
        lead += " No stratum lost all of its chips."
    caption = (
        "Each row is a stratum with its number of candidates; the dots show the share that remains "
        "after the gates, after duplicate removal, and in the dataset."
    )
    blocks: list[Block] = [Plot(plots.plot_survival(table), caption)]
    if len(emptied):
        rows = [
            (str(row.stratum_of), str(row.stratum), count(row.candidates))
            for row in each(emptied[:MOST_STRATA])
        ]
        head = ("By", "Without any kept chip", "Candidates")
        blocks.append(Table(head, rows, numeric=frozenset({2})))
    return PageSection("survival", title, lead, blocks)


def selection_section(data: ReportData) -> PageSection:
    """Quality of the selection beside other selections of the same size."""
    title = "Quality of the selection"
    table = data.measures
    if table.empty:
        return PageSection("choice", title, "Nothing was selected, so there is nothing to compare.")
    columns = [c for c in QUALITY_MEASURES if c in table]
    head = ("Selection", *(c.replace("_", " ") for c in columns))
    rows = [
        (
            SELECTION_NAMES.get(str(row["choice"]), str(row["choice"])),
            *(f"{row[c]:.4f}" if known(row[c]) else "—" for c in columns),
        )
        for row in table.to_dict("records")
    ]
    block = Table(head, rows, numeric=frozenset(range(1, len(head))), strong=frozenset({0}))
    lead = (
        "Measured over the chips that passed the gates. Facility location is the mean similarity "
        "of a chip to its nearest kept chip (higher is better). The covering radius is the largest "
        "distance of a chip to its nearest kept chip (lower is better). The spectral volume "
        "measures how much of the spectral range is kept. The Gini index measures how unevenly the "
        "clusters are represented (0 is even). All selections have the same number of chips."
    )
    return PageSection("choice", title, lead, [block])


def evaluation_sets_section(data: ReportData) -> PageSection:
    """Chips that were removed because an evaluation set contains them."""
    title = "Evaluation sets"
    facts: dict[str, Any] = data.facts("decisions").get("decontamination", {})
    sets = facts.get("sets")
    if not sets:
        lead = (
            "No evaluation set was registered (curate.evaluation_sets), so none was checked: "
            "scores on public benchmarks may be leaked."
        )
        return PageSection("contamination", title, lead)
    head = ("Set", "Checked by", "Footprints", "Images", "Chips removed")
    rows = [
        (
            str(evaluation_set["name"]),
            ", ".join(evaluation_set["checked_by"]),
            count(evaluation_set["footprints"]),
            count(evaluation_set["images"]),
            count(evaluation_set["removed"]),
        )
        for evaluation_set in sets
    ]
    blocks: list[Block] = [Table(head, rows, numeric=frozenset({2, 3, 4}))]
    if any("footprint" not in evaluation_set["checked_by"] for evaluation_set in sets):
        blocks.append(
            Note("A set without footprints is checked by the appearance of its images only.")
        )
    removed = some(facts["chips_removed"], "chip")
    lead = f"{removed} removed because an evaluation set shows the same place or picture."
    return PageSection("contamination", title, lead, blocks)
