"""The page: one HTML file that contains everything, and its figures as separate PNG files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from data_catalog.artifact import Artifact
from data_catalog.progress import tick
from data_catalog.provenance.costs import ArtifactCost, totals
from geofm.config.recipe import ReportSettings
from geofm.reporting.blocks import HeadlineCard, PageSection, Plot
from geofm.reporting.curation_sections import curation_sections
from geofm.reporting.data_sections import data_sections
from geofm.reporting.model_sections import best_score, model_sections
from geofm.reporting.pictures import arrange_in_sheet, chip_picture, evenly_spaced, with_pixels
from geofm.reporting.record_sections import (
    lineage_section,
    quarantine_section,
    settings_section,
)
from geofm.reporting.report_data import ROLES, ReportData, read_report_data
from geofm.runtime.text import amount, count, duration, each, percent, size

SHEET_COLUMNS = 8
#: Number of sections, for the progress bar.
SECTION_COUNT = 17


@dataclass(frozen=True)
class ReportPage:
    """The HTML text, and PNG files by name."""

    html: str
    pictures: dict[str, bytes]


def build_page(
    artifacts: Mapping[str, Artifact], settings: ReportSettings, costs: Sequence[ArtifactCost]
) -> ReportPage:
    """Make the report of a run.

    Args:
        artifacts: Artifacts by role; items, chips and decisions are required. A section without its
            artifact is a sentence.
        settings: Sizes of the galleries.
        costs: Costs of the artifacts and of their lineage.
    """
    data = read_report_data(artifacts, costs)
    sections: list[PageSection] = []
    for section in chain(
        [settings_section(data)],
        data_sections(data, settings),
        curation_sections(data),
        model_sections(data),
        [lineage_section(data), quarantine_section(data)],
    ):
        sections.append(section)
        tick("report", len(sections), SECTION_COUNT, section.title)
    pictures = {
        f"{block.picture.name}.png": block.picture.png
        for section in sections
        for block in section.blocks
        if isinstance(block, Plot)
    }
    pictures |= _contact_sheets(data, settings)
    return ReportPage(_render(data, sections), pictures)


def _contact_sheets(data: ReportData, settings: ReportSettings) -> dict[str, bytes]:
    """Contact sheets of kept and dropped chips, for use outside the page."""
    sheets = {}
    dropped = data.chips[data.chips["state"] == "dropped"]
    for name, table in (("kept", data.kept()), ("dropped", dropped)):
        shown = evenly_spaced(with_pixels(table), settings.montage)
        if len(shown):
            chips = data.artifacts["chips"]
            pictures = [chip_picture(chips, row) for row in each(shown)]
            columns = min(SHEET_COLUMNS, len(pictures))
            sheets[f"{name}-chips.png"] = arrange_in_sheet(pictures, columns)
    return sheets


def headline_cards(data: ReportData) -> list[HeadlineCard]:
    """The figures at the top of the page."""
    items, candidates, kept = data.items, len(data.chips), len(data.kept())
    used = int((items["status"] == "ok").sum()) if len(items) else 0
    dropped = candidates - kept
    return [
        HeadlineCard("Scenes", count(len(items)), f"{count(used)} used"),
        HeadlineCard("Candidate chips", count(candidates), _chip_size(data)),
        HeadlineCard("Dropped", count(dropped), _share(dropped, candidates)),
        HeadlineCard("Kept", count(kept), _share(kept, candidates)),
        _shards_card(data),
        _speed_card(data),
        _best_score_card(data),
        _cost_card(data),
    ]


def _share(part: int, whole: int) -> str:
    return f"{percent(part / whole)} of candidates" if whole else ""


def _chip_size(data: ReportData) -> str:
    settings = data.settings("chips")
    bands = settings.get("bands", [])
    return f"{settings['size_px']} px, {len(bands)} bands" if "size_px" in settings else ""


def _shards_card(data: ReportData) -> HeadlineCard:
    dataset = data.artifacts.get("dataset")
    if dataset is None:
        return HeadlineCard("Shards", "—", "no dataset")
    tars = [f for f in dataset.manifest.files if f.path.endswith(".tar")]
    return HeadlineCard("Shards", count(len(tars)), size(sum(f.size for f in tars)))


def _speed_card(data: ReportData) -> HeadlineCard:
    for cost in data.costs:
        rate = cost.metrics.get("images_per_second")
        if cost.stage == "pretrain" and rate is not None:
            device = cost.metrics.get("device", "one machine")
            return HeadlineCard("Training", f"{float(rate):,.0f}/s", f"images, {device}")
    return HeadlineCard("Training", "—", "speed not recorded")


def _best_score_card(data: ReportData) -> HeadlineCard:
    best = best_score(data.scores)
    if best is None:
        return HeadlineCard("Best score", "—", "no task evaluated")
    interval = f"{percent(best.ci_low, 0)} – {percent(best.ci_high, 0)}"
    return HeadlineCard("Best score", percent(best.value), f"{interval}, {best.task}")


def _cost_card(data: ReportData) -> HeadlineCard:
    total = totals(data.costs)
    if "seconds" not in total:
        return HeadlineCard("Cost", "—", "not recorded")
    units = (("kwh", "kWh"), ("kg_co2e", "kg"))
    note = ", ".join(amount(total[name], unit) for name, unit in units if name in total)
    note = f"{note} CO2e" if "kg_co2e" in total else note
    return HeadlineCard("Cost", duration(total["seconds"]), note)


def page_title(data: ReportData) -> str:
    """Name of the dataset, or a title for a run without a dataset."""
    return str(data.settings("dataset").get("name") or "curation run")


def _render(data: ReportData, sections: list[PageSection]) -> str:
    templates = files("geofm.reporting") / "templates"
    # The page contains names from untrusted catalogues, so everything is escaped.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = data_uri
    environment.filters["code"] = code_spans
    layout = (templates / "page_layout.html.j2").read_text(encoding="utf-8")
    style = (templates / "page_style.css").read_text(encoding="utf-8")
    newest = next(role for role in reversed(ROLES) if role in data.artifacts)
    return environment.from_string(layout).render(
        title=page_title(data),
        digest=data.artifacts[newest].digest,
        newest=newest,
        css=Markup(style),  # noqa: S704 - our file
        cards=headline_cards(data),
        sections=sections,
        safe=Markup,
    )


def data_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def code_spans(text: str) -> Markup:
    """Escape a text, and show `backticks` as code."""
    out = Markup()
    for number, part in enumerate(text.split("`")):
        out += Markup("<code>{}</code>").format(part) if number % 2 else Markup("{}").format(part)
    return out
