"""Sections about the data: map, drops, chips, duplicates, distributions, feature space."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from data_catalog.artifact import Artifact
from geofm.config.recipe import ReportSettings
from geofm.reporting import maps, plots
from geofm.reporting.blocks import (
    Block,
    Gallery,
    GalleryGrid,
    Note,
    PageSection,
    Plot,
    Thumbnail,
)
from geofm.reporting.pictures import chip_picture, encode_png, evenly_spaced, with_pixels
from geofm.reporting.report_data import (
    ReportData,
    count_drops,
    sample_vectors,
    with_item_states,
)
from geofm.runtime.text import count, each, known, percent, reason, some

#: Chips in the map of the feature space; t-SNE of more takes minutes and shows no more.
MOST_POINTS = 1500
#: Chips in the histograms.
MOST_HISTOGRAM = 200_000
#: Dropped chips shown per rule.
DROPPED_PER_RULE = 8
#: Dropped chips shown beside each kept duplicate.
COPIES_SHOWN = 3
#: Pairs shown with a similarity just above the threshold.
CLOSE_CALLS = 4


def data_sections(data: ReportData, settings: ReportSettings) -> Iterable[PageSection]:
    """Make the sections about the data, in the order of the page."""
    yield map_section(data)
    yield drops_section(data)
    yield kept_section(data, settings)
    yield dropped_section(data, settings)
    yield duplicates_section(data, settings)
    yield distributions_section(data)
    yield feature_space_section(data)


def map_section(data: ReportData) -> PageSection:
    """Footprints of scenes and chips."""
    items = with_item_states(data.items)
    drawn = maps.has_footprint(items)
    if not drawn.any():
        return PageSection("map", "Map", "No scene has a footprint, so there is no map to draw.")
    lead = (
        f"{count(len(items))} scenes, {count(len(data.chips))} candidate chips, "
        f"{count(len(data.kept()))} kept."
    )
    caption = (
        "Longitude and latitude (WGS 84), a panel for each of the regions with most scenes. Scenes "
        "of several dates lie on top of each other: a blue cell with an orange centre is a place "
        "where one chip was kept and another was dropped."
    )
    blocks: list[Block] = [Plot(maps.plot_footprints(items, data.chips), caption)]
    missing = int((~drawn).sum())
    if missing:
        blocks.append(
            Note(f"Without a usable footprint, and so not drawn: {some(missing, 'scene')}.")
        )
    return PageSection("map", "Map", lead, blocks)


def drops_section(data: ReportData) -> PageSection:
    """Numbers of dropped scenes and chips, by reason."""
    title = "Dropped scenes and chips"
    items, chips = with_item_states(data.items), data.chips
    if items.empty:
        return PageSection("funnel", title, "The search found no scene.")
    item_drops = count_drops(items, "state", "reason")
    chip_drops = count_drops(chips, "state", "why")
    dropped = len(chips) - len(data.kept())
    if not len(chips):
        lead = "No chip was cut."
    elif not dropped:
        lead = f"All {count(len(chips))} candidate chips were kept."
    else:
        _, why, rows = chip_drops[0]
        lead = (
            f"{count(dropped)} of {count(len(chips))} candidate chips "
            f"({percent(dropped / len(chips), 0)}) were dropped; the most frequent reason is "
            f"“{reason(why)}” with {count(rows)}."
        )
    picture = plots.plot_drops((len(items), item_drops), (len(chips), chip_drops))
    caption = "Every input row is an output row or a row with a reason: the bars add up."
    return PageSection("funnel", title, lead, [Plot(picture, caption)])


def kept_section(data: ReportData, settings: ReportSettings) -> PageSection:
    """A sample of the kept chips."""
    table = with_pixels(data.kept())
    if table.empty:
        return PageSection("kept", "Kept chips", "No chip was kept.")
    shown = evenly_spaced(table, settings.montage)
    lead = (
        f"{count(len(shown))} of {count(len(table))} kept chips, evenly spaced over collections "
        "and ids, not selected for their looks."
    )
    gallery = Gallery("", _rendering(shown), _thumbnails(data.artifacts["chips"], shown))
    return PageSection("kept", "Kept chips", lead, [gallery])


def _thumbnail(chips: Artifact, row: Any, caption: str) -> Thumbnail:
    alt = f"{row.state} chip {row.chip_id} of {row.collection}"
    return Thumbnail(encode_png(chip_picture(chips, row)), alt, caption, row.state)


def _thumbnails(chips: Artifact, rows: pd.DataFrame) -> list[Thumbnail]:
    """Thumbnails with the collection as caption."""
    return [_thumbnail(chips, row, str(row.collection)) for row in each(rows)]


def _rendering(shown: pd.DataFrame) -> str:
    """How the pictures were rendered."""
    band_lists = {tuple(bands) for bands in shown["bands"]}
    if all({"red", "green", "blue"} <= set(bands) for bands in band_lists):
        return "True colour; reflectance of 0.3 is white, with a gamma of 1.5 for the screen."
    return "Some collections lack red, green and blue: their first bands are shown instead."


def dropped_section(data: ReportData, settings: ReportSettings) -> PageSection:
    """A sample of the dropped chips for each rule."""
    dropped = data.chips[data.chips["state"] != "kept"]
    table = with_pixels(dropped)
    if table.empty:
        lead = "No chip was dropped." if dropped.empty else "No dropped chip has stored pixels."
        return PageSection("dropped", "Dropped chips", lead)
    blocks: list[Block] = []
    rules = table["why"].value_counts(sort=True)
    most = max(min(DROPPED_PER_RULE, settings.montage // len(rules)), 2)
    for rule, size in rules.items():
        rows = table[table["why"] == rule]
        text = f"{some(int(size), 'chip')}."
        reasons = rows["reason"].dropna().astype(str) if "reason" in rows else pd.Series(dtype=str)
        if len(reasons) and reasons.iloc[0]:
            text += f" For example: {reasons.iloc[0]}."
        thumbs = _thumbnails(data.artifacts["chips"], evenly_spaced(rows, most))
        blocks.append(Gallery(reason(str(rule)).capitalize(), text, thumbs))
    without_pixels = len(dropped) - len(table)
    if without_pixels:
        blocks.append(
            Note(f"{count(without_pixels)} more were dropped before their pixels were stored.")
        )
    lead = "A sample for each rule, so that a rule that drops usable chips can be seen."
    return PageSection("dropped", "Dropped chips", lead, blocks)


def duplicates_section(data: ReportData, settings: ReportSettings) -> PageSection:
    """Kept chips beside the duplicates that were dropped for them."""
    chips, title = data.chips, "Duplicates and their witnesses"
    copies = with_pixels(
        chips[chips["why"].isin(["near_duplicate", "pixel_duplicate", "identical"])]
    )
    kept = with_pixels(data.kept()).set_index("chip_id", drop=False)
    copies = copies[copies["witness_id"].isin(kept.index)]
    if copies.empty:
        return PageSection("duplicates", title, "No chip was dropped as a duplicate of another.")
    source = data.artifacts["chips"]
    galleries: list[Gallery] = []
    sizes = copies.groupby("witness_id").size().sort_values(ascending=False, kind="stable")
    for witness_id in sizes.index[: settings.clusters]:
        cluster = copies[copies["witness_id"] == witness_id].sort_values(
            ["similarity", "chip_id"], ascending=[False, True]
        )
        number = min(len(cluster), COPIES_SHOWN)
        rows = np.unique(np.linspace(0, len(cluster) - 1, number).astype(int))
        name = f"{witness_id[:10]} replaces {count(len(cluster))} more"
        text = _origin(pd.concat([kept.loc[[witness_id]], cluster]))
        galleries.append(Gallery(name, text, _witness_and_copies(source, kept, cluster.iloc[rows])))
    blocks: list[Block] = [GalleryGrid(galleries)]
    near = copies[copies["why"] == "near_duplicate"].dropna(subset=["similarity"])
    if len(near):
        blocks.append(_close_calls(source, kept, near))
    lead = (
        f"{count(len(copies))} chips were dropped because {count(len(sizes))} kept chips look the "
        "same. The first picture of each row is the witness, which was kept. The numbers are exact "
        "cosine similarities to it, or similarities of the pixels."
    )
    return PageSection("duplicates", title, lead, blocks)


def _close_calls(source: Artifact, kept: pd.DataFrame, near: pd.DataFrame) -> Gallery:
    """The duplicates with the lowest similarity to their witness."""
    closest = near.sort_values(["similarity", "chip_id"]).iloc[:CLOSE_CALLS]
    thumbs = [
        thumb
        for i in range(len(closest))
        for thumb in _witness_and_copies(source, kept, closest.iloc[[i]])
    ]
    text = "If these pairs do not look like duplicates, curate.threshold is too low."
    return Gallery("Pairs just above the threshold", text, thumbs)


def _witness_and_copies(
    source: Artifact, kept: pd.DataFrame, copies: pd.DataFrame
) -> list[Thumbnail]:
    """Thumbnails of a witness and of copies of it."""
    witness = each(kept.loc[[copies["witness_id"].iloc[0]]])[0]
    thumbs = [_thumbnail(source, witness, f"kept\n{_date(witness)}".strip())]
    for row in each(copies):
        value = "equal" if row.why == "identical" else f"{row.similarity:.4f}"
        value += " by pixels" if row.why == "pixel_duplicate" else ""
        thumbs.append(_thumbnail(source, row, f"{value}\n{_date(row)}".strip()))
    return thumbs


def _date(row: Any) -> str:
    return str(row.datetime)[:10] if known(getattr(row, "datetime", None)) else ""


def _origin(rows: pd.DataFrame) -> str:
    """Scenes and collections of chips, in a sentence."""
    scenes, collections = rows["item_id"].nunique(), sorted(rows["collection"].unique())
    return f"From {some(scenes, 'scene')} of {', '.join(map(str, collections))}."


def distributions_section(data: ReportData) -> PageSection:
    """Histograms of the scores of kept and dropped chips."""
    title = "Scores, kept and dropped"
    chips = data.chips[data.chips["status"] == "ok"]
    if len(chips) > MOST_HISTOGRAM:
        chips = chips.iloc[:: -(-len(chips) // MOST_HISTOGRAM)]
    if not plots.measured_columns(chips):
        return PageSection("scores-of-chips", title, "No candidate chip has scores.")
    threshold = data.facts("decisions").get("threshold")
    picture = plots.plot_distributions(chips, threshold)
    lead = "Quality only orders chips: it decides which of several duplicates is kept."
    medians = []
    if "entropy" in chips:
        states = ("kept", "dropped")
        medians = [chips.loc[chips["state"] == state, "entropy"].median() for state in states]
    if medians and all(known(float(median)) for median in medians):
        lead += (
            f" Median entropy is {medians[0]:.2f} bits for kept chips and {medians[1]:.2f} for "
            "dropped ones."
        )
    caption = (
        "Chips that reached curation. Entropy is shown but never maximised, because noise has the "
        "highest entropy."
    )
    return PageSection("scores-of-chips", title, lead, [Plot(picture, caption)])


def feature_space_section(data: ReportData) -> PageSection:
    """Chips in the encoder's feature space, in two dimensions."""
    title = "Feature space"
    ids, vectors = sample_vectors(data.artifacts, MOST_POINTS)
    chips = data.chips.set_index("chip_id", drop=False)
    present = [i for i, chip_id in enumerate(ids) if chip_id in chips.index]
    if len(present) < 3:
        sentence = "Fewer than three chips have a vector: nothing to map."
        return PageSection("embedding", title, sentence)
    table = chips.loc[[ids[i] for i in present]]
    flat, method = maps.project_vectors(vectors[present])
    rows = each(table)
    source = data.artifacts["chips"]
    pictures = {
        row: chip_picture(source, rows[row], 72) for row in maps.mosaic_rows(flat) if rows[row].part
    }
    states, collections = table["state"].tolist(), table["collection"].astype(str).tolist()
    picture = maps.plot_feature_space(flat, states, collections, pictures, method)
    encoder = data.facts("embeddings").get("encoder", "the encoder")
    lead = (
        f"{count(len(present))} chips in the feature space of {encoder}. Orange groups with little "
        "blue are removed duplicates; orange regions without blue would be a gap in the dataset."
    )
    caption = (
        f"{method} with a fixed seed; distances between far groups mean little. "
        "Decisions are made in the full space, not in this picture."
    )
    return PageSection("embedding", title, lead, [Plot(picture, caption)])
