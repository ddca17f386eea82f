"""The curation's own part of the page: thresholds, whom the filters hit, how good the choice is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from geofm.reporting import plots as curation_plots
from geofm.reporting.blocks import Note, Plain, Plot, Section, Table
from geofm.reporting.report_data import Material
from geofm.runtime import text as words
from geofm.runtime.text import count, each, percent

CHOICES = {"kept": "this dataset", "random": "random choice", "balanced-kmeans":
           "balanced k-means"}  # fmt: skip
MEASURES = ("facility_location", "covering_radius", "spectral_log_volume", "cluster_gini")


def thresholds(material: Material) -> Section:
    """Where the duplicate threshold comes from."""
    title = "Thresholds"
    facts = material.facts("calibration")
    found: dict[str, dict[str, Any]] = facts.get("thresholds", {})
    if not found:
        return Section("thresholds", title, "No threshold was calibrated.")
    rows = [
        (name, f"{one['threshold']:.4f}", f"{one['source']}: {one['reason']}",
         count(one["positives"]), count(one["negatives"]))
        for name, one in sorted(found.items())
    ]  # fmt: skip
    blocks: list[Plain] = [
        Table(
            ("Collection", "Cosine from", "Where it comes from", "Like pairs", "Unlike pairs"),
            rows,
            numeric=frozenset({1, 3, 4}),
        )
    ]
    curve = material.curve
    if len(curve):
        curve = curve[curve["class"] == "all"].dropna(subset=["precision"])
    if len(curve):
        chosen = {name: float(one["threshold"]) for name, one in found.items()}
        caption = (
            "Pairs whose truth is known without looking at them: re-rendered and overlapping chips "
            "are alike, other dates and far places are not."
        )
        blocks.append(Plot(curation_plots.calibration(curve, chosen), caption))
    lead = (
        "From which cosine similarity two chips of this encoder and sensor are duplicates, "
        "measured on pairs that metadata already knows."
    )
    return Section("thresholds", title, lead, blocks)


def survival(material: Material) -> Section:
    """Whom the filters hit."""
    title = "Whom the filters hit"
    table = material.survival
    if table.empty:
        return Section("survival", title, "Nothing reached curation.")
    whole = table[table["stratum_of"] == table["stratum_of"].iloc[0]]
    overall = whole["kept"].sum() / max(int(whole["candidates"].sum()), 1)
    gone = table[(table["kept"] == 0) & (table["candidates"] > 0)]
    lead = f"{percent(overall, 0)} of the candidates stay."
    if len(gone):
        lead += (
            f" {words.some(len(gone), 'stratum')} lost every chip: look there for a filter's bias."
        )
    else:
        lead += " No stratum lost all of its chips."
    caption = (
        "Each row is a stratum with its number of candidates; dots are what is left after the "
        "gates, after duplicates, and in the end."
    )
    blocks: list[Plain] = [Plot(curation_plots.survival(table), caption)]
    if len(gone):
        rows = [(str(r.stratum_of), str(r.stratum), count(r.candidates)) for r in each(gone[:20])]
        blocks.append(
            Table(("By", "Without any kept chip", "Candidates"), rows, numeric=frozenset({2}))
        )
    return Section("survival", title, lead, blocks)


def choice(material: Material) -> Section:
    """How good the choice is beside others of the same size."""
    title = "How good the choice is"
    table = material.measures
    if table.empty:
        return Section("choice", title, "Nothing was chosen, so there is nothing to compare.")
    columns = [c for c in MEASURES if c in table]
    rows = [
        (CHOICES.get(str(row["choice"]), str(row["choice"])),
         *(f"{row[c]:.4f}" if words.known(row[c]) else "—" for c in columns))
        for row in table.to_dict("records")
    ]  # fmt: skip
    head = ("Choice", *(c.replace("_", " ") for c in columns))
    block = Table(head, rows, numeric=frozenset(range(1, len(head))), strong=frozenset({0}))
    lead = (
        "Measured over the chips that passed the gates: facility location is the mean similarity "
        "of a chip to its nearest kept one (higher is better), the covering radius how far the "
        "worst-served chip is (lower is better), the spectral volume how much of the spectral "
        "range is kept, the Gini index how unevenly clusters are served (0 is even). All choices "
        "have the same number of chips."
    )
    return Section("choice", title, lead, [block])


def contamination(material: Material) -> Section:
    """What was removed because an evaluation set has it."""
    title = "Evaluation sets"
    found: dict[str, Any] = material.facts("decisions").get("decontamination", {})
    if not found.get("sets"):
        lead = (
            "No evaluation set was registered (curate.evaluation_sets), so none was checked: "
            "scores on public benchmarks may be leaked."
        )
        return Section("contamination", title, lead)
    rows = [
        (
            str(one["name"]), ", ".join(one["checked_by"]), count(one["footprints"]),
            count(one["images"]), count(one["removed"]),
        )
        for one in found["sets"]
    ]  # fmt: skip
    head = ("Set", "Checked by", "Footprints", "Images", "Chips removed")
    blocks: list[Plain] = [Table(head, rows, numeric=frozenset({2, 3, 4}))]
    if any("footprint" not in one["checked_by"] for one in found["sets"]):
        blocks.append(
            Note("A set without footprints can be checked by what its images look like only.")
        )
    removed = words.some(found["chips_removed"], "chip")
    lead = f"{removed} removed because an evaluation set shows the same place or picture."
    return Section("contamination", title, lead, blocks)


def sections(material: Material) -> Iterable[Section]:
    """In the order of the page."""
    yield thresholds(material)
    yield survival(material)
    yield choice(material)
    yield contamination(material)
