"""The data half of the page: where, what fell and why, what it looks like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from data_catalog.artifact import Artifact
from geofm.config.recipe import ReportSettings
from geofm.reporting import maps, plots
from geofm.reporting.blocks import Clusters, Note, Plain, Plot, Section, Thumb, Thumbs
from geofm.reporting.pictures import chip_picture, png, spread, stored
from geofm.reporting.report_data import Material, cascade, item_states, vectors
from geofm.runtime import text as words
from geofm.runtime.text import count, each, reason

#: Chips drawn in the feature map; t-SNE beyond it takes minutes and shows no more.
MOST_POINTS = 1500
MOST_HISTOGRAM = 200_000
DROPPED_PER_RULE = 8
COPIES_SHOWN = 3
CLOSE_CALLS = 4


def where(material: Material) -> Section:
    """Footprints of scenes and chips."""
    items = item_states(material.items)
    drawn = maps.drawable(items)
    if not drawn.any():
        return Section("map", "Where", "No scene has a footprint, so there is no map to draw.")
    picture = maps.footprints(items, material.chips)
    lead = (
        f"{count(len(items))} scenes, {count(len(material.chips))} candidate chips, "
        f"{count(len(material.kept()))} kept."
    )
    caption = (
        "Longitude and latitude (WGS 84), one panel per place with the most scenes. Scenes of "
        "several dates lie on top of each other: a blue cell with an orange centre is a place "
        "where one chip stays and another was dropped."
    )
    blocks: list[Plain] = [Plot(picture, caption)]
    lost = int((~drawn).sum())
    if lost:
        blocks.append(
            Note(f"Without a usable footprint, and so not drawn: {words.some(lost, 'scene')}.")
        )
    return Section("map", "Where", lead, blocks)


def funnel(material: Material) -> Section:
    """What fell, by reason."""
    items, chips = item_states(material.items), material.chips
    if items.empty:
        return Section("funnel", "What was dropped, and why", "The search found no scene.")
    scene_steps = cascade(items, "state", "reason")
    chip_steps = cascade(chips, "state", "why")
    gone = len(chips) - len(material.kept())
    if not len(chips):
        lead = "No chip was cut."
    elif not gone:
        lead = f"All {count(len(chips))} candidate chips were kept."
    else:
        _, why, rows = chip_steps[0]
        lead = (
            f"{count(gone)} of {count(len(chips))} candidate chips "
            f"({words.percent(gone / len(chips), 0)}) were dropped; the commonest reason is "
            f"“{reason(why)}” with {count(rows)}."
        )
    picture = plots.funnel((len(items), scene_steps), (len(chips), chip_steps))
    caption = "Every row in is a row out or a row with a reason: the bars of a panel add up."
    return Section("funnel", "What was dropped, and why", lead, [Plot(picture, caption)])


def thumb(chips: Artifact, row: Any, caption: str) -> Thumb:
    """One chip as a thumbnail."""
    alt = f"{row.state} chip {row.chip_id} of {row.collection}"
    return Thumb(png(chip_picture(chips, row)), alt, caption, row.state)


def _thumbs(chips: Artifact, rows: pd.DataFrame, caption: str = "collection") -> list[Thumb]:
    return [thumb(chips, row, str(getattr(row, caption))) for row in each(rows)]


def kept(material: Material, settings: ReportSettings) -> Section:
    """A sample of what is kept."""
    table = stored(material.kept())
    if table.empty:
        return Section("kept", "Kept chips", "No chip was kept.")
    shown = spread(table, settings.montage)
    lead = (
        f"{count(len(shown))} of {count(len(table))} kept chips, evenly spaced over collections "
        "and ids, not chosen for their looks."
    )
    gallery = Thumbs("", _tone(shown), _thumbs(material.artifacts["chips"], shown))
    return Section("kept", "Kept chips", lead, [gallery])


def _tone(shown: pd.DataFrame) -> str:
    """How the pictures were made, where that is not obvious."""
    bands = {tuple(b) for b in shown["bands"]}
    if all({"red", "green", "blue"} <= set(b) for b in bands):
        return "True colour; reflectance of 0.3 is white, with a gamma of 1.5 for the screen."
    return "Some collections lack red, green and blue: their first bands are shown instead."


def dropped(material: Material, settings: ReportSettings) -> Section:
    """Samples of what was dropped, by rule."""
    gone = material.chips[material.chips["state"] != "kept"]
    table = stored(gone)
    if table.empty:
        lead = "No chip was dropped." if gone.empty else "No dropped chip has stored pixels."
        return Section("dropped", "Dropped chips", lead)
    blocks: list[Plain] = []
    rules = table["why"].value_counts(sort=True)
    most = max(min(DROPPED_PER_RULE, settings.montage // len(rules)), 2)
    for rule, rows in rules.items():
        mine = table[table["why"] == rule]
        shown = spread(mine, most)
        text = f"{words.some(int(rows), 'chip')}."
        said = mine["reason"].dropna().astype(str) if "reason" in mine else pd.Series(dtype=str)
        if len(said) and said.iloc[0]:
            text += f" For example: {said.iloc[0]}."
        title = reason(str(rule)).capitalize()
        blocks.append(Thumbs(title, text, _thumbs(material.artifacts["chips"], shown)))
    unseen = len(gone) - len(table)
    if unseen:
        blocks.append(Note(f"{count(unseen)} more were dropped before their pixels were stored."))
    lead = "A sample for each rule, so that a rule that drops the wrong thing can be seen."
    return Section("dropped", "Dropped chips", lead, blocks)


def duplicates(material: Material, settings: ReportSettings) -> Section:
    """Duplicate clusters: the kept chip beside those dropped for it."""
    chips = material.chips
    copies = stored(chips[chips["why"].isin(["near_duplicate", "pixel_duplicate", "identical"])])
    by_id = stored(material.kept()).set_index("chip_id", drop=False)
    copies = copies[copies["witness_id"].isin(by_id.index)]
    title = "Duplicates and their witnesses"
    if copies.empty:
        return Section("duplicates", title, "No chip was dropped as a duplicate of another.")
    source = material.artifacts["chips"]
    groups: list[Thumbs] = []
    sizes = copies.groupby("witness_id").size().sort_values(ascending=False, kind="stable")
    for witness_id in sizes.index[: settings.clusters]:
        mine = copies[copies["witness_id"] == witness_id].sort_values(
            ["similarity", "chip_id"], ascending=[False, True]
        )
        pick = np.unique(np.linspace(0, len(mine) - 1, min(len(mine), COPIES_SHOWN)).astype(int))
        name = f"{witness_id[:10]} stands for {count(len(mine))} more"
        text = _places(pd.concat([by_id.loc[[witness_id]], mine]))
        row = _pair(source, by_id, mine.iloc[pick])
        groups.append(Thumbs(name, text, row))
    blocks: list[Plain] = [Clusters(groups)]
    near = copies[copies["why"] == "near_duplicate"].dropna(subset=["similarity"])
    if len(near):
        closest = near.sort_values(["similarity", "chip_id"]).iloc[:CLOSE_CALLS]
        row = [t for i in range(len(closest)) for t in _pair(source, by_id, closest.iloc[[i]])]
        text = (
            "Pairs just above the threshold: if these do not look like duplicates, "
            "curate.threshold is too low."
        )
        blocks.append(Thumbs("The closest calls", text, row))
    lead = (
        f"{count(len(copies))} chips were dropped because {count(len(sizes))} kept ones look the "
        "same. Left in each row is the witness, which stays; the number is the exact cosine "
        "similarity to it, or the likeness of the pixels."
    )
    return Section("duplicates", title, lead, blocks)


def _pair(source: Artifact, by_id: pd.DataFrame, rows: pd.DataFrame) -> list[Thumb]:
    """The witness of these rows, then the rows."""
    witness = each(by_id.loc[[rows["witness_id"].iloc[0]]])[0]
    thumbs = [thumb(source, witness, f"kept\n{_day(witness)}".strip())]
    for row in each(rows):
        value = "equal" if row.why == "identical" else f"{row.similarity:.4f}"
        value += " by pixels" if row.why == "pixel_duplicate" else ""
        thumbs.append(thumb(source, row, f"{value}\n{_day(row)}".strip()))
    return thumbs


def _day(row: Any) -> str:
    return str(row.datetime)[:10] if words.known(getattr(row, "datetime", None)) else ""


def _places(rows: pd.DataFrame) -> str:
    scenes, collections = rows["item_id"].nunique(), sorted(rows["collection"].unique())
    return f"From {words.some(scenes, 'scene')} of {', '.join(map(str, collections))}."


def distributions(material: Material) -> Section:
    """Histograms of the scores."""
    title = "Scores, kept and dropped"
    chips = material.chips[material.chips["status"] == "ok"]
    if len(chips) > MOST_HISTOGRAM:
        chips = chips.iloc[:: -(-len(chips) // MOST_HISTOGRAM)]
    if not plots.measured(chips):
        return Section("scores-of-chips", title, "No candidate chip has scores.")
    threshold = material.facts("decisions").get("threshold")
    picture = plots.distributions(chips, threshold)
    halves = [
        chips.loc[chips["state"] == s, "entropy"].median() for s in ("kept", "dropped")
    ] if "entropy" in chips else []  # fmt: skip
    lead = "Quality only orders chips; it decides which of several duplicates stays."
    if len(halves) == 2 and all(words.known(h) for h in map(float, halves)):
        lead += (
            f" Median entropy is {halves[0]:.2f} bits for kept chips and {halves[1]:.2f} for "
            "dropped ones."
        )
    caption = (
        "Chips that reached curation. Entropy is shown, never maximised: noise has the most of it."
    )
    return Section("scores-of-chips", title, lead, [Plot(picture, caption)])


def embedding(material: Material) -> Section:
    """The chips in the encoder's feature space."""
    title = "Feature space"
    ids, matrix = vectors(material.artifacts, MOST_POINTS)
    chips = material.chips.set_index("chip_id", drop=False)
    found = [i for i, chip_id in enumerate(ids) if chip_id in chips.index]
    if len(found) < 3:
        return Section("embedding", title, "Fewer than three chips have a vector: nothing to map.")
    table = chips.loc[[ids[i] for i in found]]
    flat, method = maps.flatten(matrix[found])
    source = material.artifacts["chips"]
    rows = each(table)
    pictures = {
        row: chip_picture(source, rows[row], 72) for row in maps.mosaic_rows(flat) if rows[row].part
    }
    picture = maps.embedding(
        flat, table["state"].tolist(), table["collection"].astype(str).tolist(), pictures, method
    )
    encoder = material.facts("embeddings").get("encoder", "the encoder")
    lead = (
        f"{count(len(found))} chips by what {encoder} sees in them. Orange clumps with little blue "
        "are redundancy removed; orange regions without blue would be a gap."
    )
    caption = (
        f"{method} with a fixed seed; distances between far groups mean little. "
        "Decisions are taken in the full space, not in this picture."
    )
    return Section("embedding", title, lead, [Plot(picture, caption)])


def sections(material: Material, settings: ReportSettings) -> Iterable[Section]:
    """The data half, in the order of the page."""
    yield where(material)
    yield funnel(material)
    yield kept(material, settings)
    yield dropped(material, settings)
    yield duplicates(material, settings)
    yield distributions(material)
    yield embedding(material)
