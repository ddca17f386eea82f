"""The page: one HTML file that needs nothing else, and its figures as PNGs beside it."""

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
from data_catalog.provenance.costs import Cost, totals
from geofm.config.recipe import ReportSettings
from geofm.reporting import curation_sections, data_sections, model_sections, record_sections
from geofm.reporting.blocks import Card, Plot, Section
from geofm.reporting.pictures import chip_picture, sheet, spread, stored
from geofm.reporting.report_data import Material, gather
from geofm.runtime import text as words
from geofm.runtime.text import count, each, percent

SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Page:
    """The HTML, and PNG files by name."""

    html: str
    pictures: dict[str, bytes]


def build_page(
    artifacts: Mapping[str, Artifact], settings: ReportSettings, costs: Sequence[Cost]
) -> Page:
    """Make the report of a run.

    Args:
        artifacts: by role; items, chips and decisions are needed. What else is missing is said
            in a sentence.
        settings: sizes of the montages.
        costs: of the artifacts and of all they were made from.
    """
    material = gather(artifacts, costs)
    sections: list[Section] = [record_sections.asked(material)]
    for section in chain(
        data_sections.sections(material, settings), curation_sections.sections(material)
    ):
        sections.append(section)
        tick("report", len(sections), 17, section.title)
    sections += model_sections.sections(material)
    sections += [record_sections.origin(material), record_sections.quarantine(material)]
    pictures = {
        f"{block.picture.name}.png": block.picture.png
        for section in sections
        for block in section.blocks
        if isinstance(block, Plot)
    }
    pictures |= _sheets(material, settings)
    return Page(_render(material, sections), pictures)


def _sheets(material: Material, settings: ReportSettings) -> dict[str, bytes]:
    """Contact sheets of kept and of dropped chips, for use outside the page."""
    sheets = {}
    for name, table in (
        ("kept", material.kept()),
        ("dropped", material.chips[material.chips["state"] == "dropped"]),
    ):
        shown = spread(stored(table), settings.montage)
        if len(shown):
            chips = material.artifacts["chips"]
            pictures = [chip_picture(chips, row) for row in each(shown)]
            sheets[f"{name}-chips.png"] = sheet(pictures, min(SHEET_COLUMNS, len(pictures)))
    return sheets


def headline(material: Material) -> list[Card]:
    """The numbers at the top of the page."""
    items, chips, kept = material.items, material.chips, material.kept()
    usable = int((items["status"] == "ok").sum()) if len(items) else 0
    cards = [
        Card("Scenes", count(len(items)), f"{count(usable)} used"),
        Card("Candidate chips", count(len(chips)), _size_of(material)),
        Card("Dropped", count(len(chips) - len(kept)), _share(len(chips) - len(kept), len(chips))),
        Card("Kept", count(len(kept)), _share(len(kept), len(chips))),
        _shards(material),
        _speed(material),
        _best(material),
        _cost(material),
    ]
    return cards


def _share(part: int, whole: int) -> str:
    return f"{percent(part / whole)} of candidates" if whole else ""


def _size_of(material: Material) -> str:
    settings = material.settings("chips")
    bands = settings.get("bands", [])
    return f"{settings['size_px']} px, {len(bands)} bands" if "size_px" in settings else ""


def _shards(material: Material) -> Card:
    dataset = material.artifacts.get("dataset")
    if dataset is None:
        return Card("Shards", "—", "no dataset")
    tars = [f for f in dataset.manifest.files if f.path.endswith(".tar")]
    return Card("Shards", count(len(tars)), words.size(sum(f.size for f in tars)))


def _speed(material: Material) -> Card:
    for cost in material.costs:
        rate = cost.metrics.get("images_per_second")
        if cost.stage == "pretrain" and rate is not None:
            device = cost.metrics.get("device", "one machine")
            return Card("Training", f"{float(rate):,.0f}/s", f"images, {device}")
    return Card("Training", "—", "speed not recorded")


def _best(material: Material) -> Card:
    best = model_sections.best_score(material.scores)
    if best is None:
        return Card("Best score", "—", "no task evaluated")
    return Card(
        "Best score", percent(best.value),
        f"{percent(best.ci_low, 0)} – {percent(best.ci_high, 0)}, {best.task}",
    )  # fmt: skip


def _cost(material: Material) -> Card:
    whole = totals(material.costs)
    if "seconds" not in whole:
        return Card("Cost", "—", "not recorded")
    note = ", ".join(
        words.amount(whole[name], unit)
        for name, unit in (("kwh", "kWh"), ("kg_co2e", "kg"))
        if name in whole
    )
    return Card(
        "Cost", words.duration(whole["seconds"]), f"{note} CO2e" if "kg_co2e" in whole else note
    )


def title_of(material: Material) -> str:
    """The dataset's name, or what else the run is known by."""
    return str(material.settings("dataset").get("name") or "curation run")


def data_uri(png: bytes) -> str:
    """A PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _render(material: Material, sections: list[Section]) -> str:
    folder = files("geofm.reporting") / "templates"
    # untrusted names from catalogues end up in the page: everything is escaped
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = data_uri
    environment.filters["code"] = code_spans
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    newest = next(r for r in reversed(record_sections.ROLES) if r in material.artifacts)
    return template.render(
        title=title_of(material),
        digest=material.artifacts[newest].digest,
        newest=newest,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - our file
        cards=headline(material),
        sections=sections,
        safe=Markup,
    )


def code_spans(text: str) -> Markup:
    """Text with `backticks` as code; everything is escaped first."""
    parts = text.split("`")
    out = Markup()
    for number, part in enumerate(parts):
        out += Markup("<code>{}</code>").format(part) if number % 2 else Markup("{}").format(part)
    return out
