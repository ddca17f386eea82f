"""The page has all sections, loads nothing, has no empty picture, and escapes all names."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.recipe import ReportSettings
from geofm.reporting.page import ReportPage
from geofm.reporting.report import STAGE
from tests.geofm.reporting.synthetic import HOSTILE

SECTIONS = {
    "settings": "Settings",
    "map": "Map",
    "funnel": "Dropped scenes and chips",
    "kept": "Kept chips",
    "dropped": "Dropped chips",
    "duplicates": "Duplicates and their witnesses",
    "scores-of-chips": "Scores, kept and dropped",
    "embedding": "Feature space",
    "thresholds": "Thresholds",
    "survival": "Effect of the filters by stratum",
    "choice": "Quality of the selection",
    "contamination": "Evaluation sets",
    "training": "Training",
    "scores": "Scores",
    "cost": "Cost",
    "lineage": "Lineage",
    "quarantine": "Quarantine",
}
#: Attributes with which a page can load a resource.
LOADING = {"src", "srcset", "href", "data", "poster", "action", "background", "xlink:href"}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Collects the addresses that a browser would load, the images, and unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.loads += [v or "" for k, v in attrs if k in LOADING]
        if tag == "img":
            self.images.append(found)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag not in VOID and tag not in ("path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "rect"):
            return
        assert self.open.pop() == tag


def body_of(page: ReportPage, section: str) -> str:
    found = re.search(rf'<section id="{section}">(.*?)</section>', page.html, re.S)
    assert found is not None
    return html.unescape(re.sub(r"<[^>]+>", " ", found[1]))


def test_every_section_is_there_and_in_the_contents(
    page: ReportPage, bare_page: ReportPage
) -> None:
    for made in (page, bare_page):
        read = Reader(made.html)
        assert not read.open
        for anchor, title in SECTIONS.items():
            assert read.ids.count(anchor) == 1
            assert f'<a href="#{anchor}">{title}</a>' in made.html
            assert f"<h2>{title}</h2>" in made.html


def test_nothing_is_fetched(page: ReportPage) -> None:
    read = Reader(page.html)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in read.loads)
    assert not read.tags & {"script", "link", "iframe", "object", "embed"}
    css = re.search(r"<style>(.*?)</style>", page.html, re.S)
    assert css is not None
    assert "url(" not in css[1]
    assert "@import" not in css[1]


def test_every_image_is_a_png_with_something_on_it_and_a_description(page: ReportPage) -> None:
    images = Reader(page.html).images
    assert len(images) > 40
    for image in images:
        data = base64.b64decode(str(image["src"]).partition(",")[2], validate=True)
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG"
        assert np.ptp(np.asarray(picture.convert("L"))) > 0
        assert len(str(image["alt"])) > 10


def test_figures_are_twice_as_sharp_as_they_are_shown(page: ReportPage) -> None:
    for name in ("map.png", "funnel.png", "scores.png", "training.png", "embedding.png"):
        assert Image.open(io.BytesIO(page.pictures[name])).width == 2120
    assert 'width="1060"' in page.html


def test_names_from_catalogues_are_escaped(page: ReportPage) -> None:
    assert HOSTILE not in page.html
    assert html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;") in page.html
    assert "bad id" in body_of(page, "quarantine")


def test_headline_and_funnel_agree_with_the_artifacts(
    page: ReportPage, run: dict[str, Artifact]
) -> None:
    kept = run["dataset"].manifest.counts["rows_out"]
    total = run["chips"].manifest.counts["rows_in"]
    assert f'Candidate chips</span><span class="value">{total}<' in page.html
    assert f'Kept</span><span class="value">{kept}<' in page.html
    assert f'Dropped</span><span class="value">{total - kept}<' in page.html
    assert '"value">148/s<' in page.html
    text = body_of(page, "funnel")
    assert f"{total - kept} of {total} candidate chips" in text


def test_thresholds_survivors_measures_and_leaks_are_said(page: ReportPage) -> None:
    said = body_of(page, "thresholds")
    assert "0.9300" in said
    assert "too few pairs" in said
    assert "1 stratum lost every chip" in body_of(page, "survival")
    choice = body_of(page, "choice")
    assert "0.9100" in choice
    assert "—" in choice  # a value that could not be measured
    leaks = body_of(page, "contamination")
    assert "3 chips removed" in leaks
    assert "by the appearance of its images only" in leaks
    assert {"calibration.png", "survival.png"} <= set(page.pictures)


def test_duplicates_stand_beside_their_witness(page: ReportPage, run: dict[str, Artifact]) -> None:
    decisions = run["decisions"].table("decisions.parquet")
    near = decisions[decisions["rule"] == "near_duplicate"]
    text = body_of(page, "duplicates")
    assert f"{near['similarity'].min():.4f}" in text
    largest = near.groupby("witness_id").size().idxmax()
    assert str(largest)[:10] in text
    assert "Pairs just above the threshold" in text


def test_captions_have_a_line_for_the_likeness_and_one_for_the_date(page: ReportPage) -> None:
    found = re.search(r'<section id="duplicates">(.*?)</section>', page.html, re.S)
    assert found is not None
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", found[1], re.S)
    assert len(captions) > 4
    for caption in captions:
        likeness, date = caption.split("\n")
        assert re.fullmatch(r"kept|equal|\d\.\d{4}( by pixels)?", likeness)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    rule = re.search(r"\.thumb figcaption {(.*?)}", page.html, re.S)
    assert rule is not None
    assert "white-space: pre-line" in rule[1]
    assert "nowrap" not in rule[1]


def test_scores_say_what_they_are_worth(page: ReportPage) -> None:
    text = body_of(page, "scores")
    assert "85.0\u202f%" in text
    assert "+26.0 points against a random network" in text
    assert "−4.0 points against the frozen teacher, which may be chance" in text
    assert "One training seed" in text
    assert text.index("frozen teacher") < text.index("random init")


def test_cost_stands_beside_the_papers_constant(page: ReportPage) -> None:
    text = body_of(page, "cost")
    assert "0.1425 kg CO2e per V100-hour" in text
    assert "not a measurement" in text
    assert "149.1" in text
    for said in ("buckets", "of it the teacher", "31.5", "pretrain (2)", "GPU-seconds"):
        assert said in text


def test_the_forecast_stands_beside_what_came(page: ReportPage) -> None:
    text = body_of(page, "cost")
    for said in ("Took / forecast", "records (3 runs)", "10 s", "14 s", "1.42"):
        assert said in text, said


def test_lineage_names_every_digest_and_licence(page: ReportPage, run: dict[str, Artifact]) -> None:
    text = body_of(page, "lineage")
    for artifact in run.values():
        assert artifact.digest in text
        assert artifact.digest[:12] in text
    assert "CC-BY-4.0" in text
    assert "PDDL-1.0" in text
    assert "recall lower bound" in text


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("duplicates", "No chip was dropped as a duplicate of another."),
        ("training", "This run trained no model."),
        ("scores", "No downstream task was evaluated."),
        ("cost", "The catalogue has no record of what these stages cost."),
    ],
)
def test_what_is_empty_is_a_sentence(bare_page: ReportPage, section: str, sentence: str) -> None:
    found = re.search(rf'<section id="{section}">(.*?)</section>', bare_page.html, re.S)
    assert found is not None
    assert sentence in html.unescape(found[1])
    assert "<img" not in found[1]


def test_the_stage_writes_the_page_and_its_pictures(
    store: Store, catalogue: Catalogue, run: dict[str, Artifact]
) -> None:
    made = run_stage(STAGE, store, catalogue, run, ReportSettings(montage=4, clusters=1))
    names = {f.path for f in made.manifest.files}
    assert {"report.html", "map.png", "scores.png", "kept-chips.png"} <= names
    assert not made.manifest.deterministic
    assert made.local("report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
