"""Maps: footprints on the Earth, and chips in the encoder's feature space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from geofm.reporting.plots import (
    GRID,
    INK,
    NEUTRAL,
    SERIES,
    SOFT,
    STATES,
    Picture,
    new_figure,
    save_figure,
)
from geofm.types import Floats

#: Scenes closer to each other than this (degrees) are one region and share a panel.
REGION_DISTANCE = 0.25
#: Regions that get a panel.
MOST_REGIONS = 6
#: Footprints drawn in a panel; more could not be distinguished.
MOST_FOOTPRINTS = 6000


def group_scenes(geometries: Sequence[Any]) -> list[Floats]:
    """Group scenes into regions.

    Args:
        geometries: Footprints in degrees.

    Returns:
        Bounding box (west, south, east, north) of each region, the region with most scenes first.
    """
    boxes = shapely.box(*shapely.bounds(np.asarray(geometries, dtype=object)).T)
    merged = shapely.union_all(shapely.buffer(boxes, REGION_DISTANCE / 2, cap_style="square"))
    parts = shapely.get_parts(merged)
    tree = shapely.STRtree(parts)
    scene, part = tree.query(boxes, predicate="intersects")
    sizes = np.bincount(part, minlength=len(parts))
    regions = []
    for number in np.argsort(-sizes, kind="stable"):
        members = boxes[scene[part == number]]
        regions.append(np.asarray(shapely.total_bounds(members), dtype=np.float64))
    return regions


def plot_footprints(items: pd.DataFrame, chips: pd.DataFrame) -> Picture:
    """Draw scenes and chips by state: an overview, and a panel per region.

    Args:
        items: Columns ``geometry`` (EPSG:4326) and ``state``; at least one geometry.
        chips: Columns ``geometry`` and ``state``.
    """
    items = items[has_footprint(items)]
    chips = chips[has_footprint(chips)]
    regions = group_scenes(items["geometry"].tolist())
    shown = regions[:MOST_REGIONS]
    columns = 2 if len(shown) in (2, 4) else min(len(shown), 3)
    rows = -(-len(shown) // columns)
    several = len(regions) > 1
    heights = ([2.7] if several else []) + [3.3 if columns > 1 else 5.4] * rows
    with new_figure(sum(heights) + 0.5) as figure:
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        if several:
            _draw_overview(figure.add_subplot(grid[0, :]), items, regions)
        for number, box in enumerate(shown):
            line, column = divmod(number, columns)
            panel = figure.add_subplot(grid[line + int(several), column])
            _draw_region(panel, items, chips, box, str(number + 1) if several else "")
        _draw_legend(figure, items, chips)
        counts = ", ".join(f"{n} {s}" for s, n in chips["state"].value_counts().items())
        alt = f"Map of {len(items)} scene footprints in {len(regions)} region(s); chips: {counts}"
        return save_figure(figure, "map", alt)


def has_footprint(table: pd.DataFrame) -> pd.Series:
    """Mark the rows whose footprint can be shown on a map in degrees."""
    shapes = np.asarray(table["geometry"].tolist(), dtype=object)
    inside = ~(shapely.is_missing(shapes) | shapely.is_empty(shapes))
    bounds = shapely.bounds(shapes)
    with np.errstate(invalid="ignore"):
        inside &= (np.abs(bounds[:, [0, 2]]) <= 180).all(1) & (np.abs(bounds[:, [1, 3]]) <= 90).all(
            1
        )
    return pd.Series(inside, index=table.index)


def _draw_graticule(axes: Axes, latitude: float, x_ticks: int = 3) -> None:
    axes.set_aspect(1 / max(np.cos(np.radians(latitude)), 0.2))
    axes.xaxis.set_major_formatter(lambda v, _: _degrees(v, "E", "W"))
    axes.yaxis.set_major_formatter(lambda v, _: _degrees(v, "N", "S"))
    axes.locator_params(axis="x", nbins=x_ticks, steps=[1, 2, 5, 10])
    axes.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
    axes.tick_params(labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _degrees(value: float, positive: str, negative: str) -> str:
    return f"{round(abs(value), 4):g}°{positive if value > 0 else negative if value < 0 else ''}"


def _draw_overview(axes: Axes, items: pd.DataFrame, regions: list[Floats]) -> None:
    centres = shapely.centroid(np.asarray(items["geometry"].tolist(), dtype=object))
    x, y = shapely.get_x(centres), shapely.get_y(centres)
    for state, colour in STATES.items():
        selected = (items["state"] == state).to_numpy()
        axes.scatter(
            x[selected], y[selected], s=22, color=colour, alpha=0.8, linewidths=0, zorder=3
        )
    for number, box in enumerate(regions[:MOST_REGIONS]):
        axes.annotate(
            str(number + 1),
            ((box[0] + box[2]) / 2, box[3]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )
    west, south, east, north = np.min(x), np.min(y), np.max(x), np.max(y)
    pad_x, pad_y = max((east - west) * 0.06, 1.0), max((north - south) * 0.12, 1.0)
    axes.set_xlim(max(west - pad_x, -180), min(east + pad_x, 180))
    axes.set_ylim(max(south - pad_y, -90), min(north + pad_y, 90))
    _draw_graticule(axes, float(south + north) / 2, x_ticks=8)
    axes.set_aspect("auto")
    axes.set_title("All scenes")


def _draw_region(
    axes: Axes, items: pd.DataFrame, chips: pd.DataFrame, box: Floats, name: str
) -> None:
    window = shapely.box(*box)
    scenes = items[shapely.intersects(np.asarray(items["geometry"].tolist(), dtype=object), window)]
    inside = chips
    if len(chips):
        shapes = np.asarray(chips["geometry"].tolist(), dtype=object)
        inside = chips[shapely.intersects(shapes, window)]
    step = max(-(-len(inside) // MOST_FOOTPRINTS), 1)
    # Kept chips cover dropped ones, so dropped chips are drawn again as a small central mark.
    for state, share in (("dropped", 1.0), ("quarantined", 1.0), ("kept", 1.0), ("dropped", 0.4)):
        rings = [
            ring.mean(axis=0) + share * (ring - ring.mean(axis=0))
            for ring in _rings(inside[inside["state"] == state].iloc[::step])
        ]
        axes.add_collection(
            PolyCollection(rings, facecolors=STATES[state], edgecolors="white", linewidths=0.4)
        )
    for state, style in (("kept", "-"), ("dropped", "--"), ("quarantined", ":")):
        rings = _rings(scenes[scenes["state"] == state])
        colour = NEUTRAL if state == "kept" else STATES[state]
        axes.add_collection(LineCollection(rings, colors=colour, linewidths=1.1, linestyles=style))
    pad_x, pad_y = (box[2] - box[0]) * 0.04 + 1e-4, (box[3] - box[1]) * 0.04 + 1e-4
    axes.set_xlim(box[0] - pad_x, box[2] + pad_x)
    axes.set_ylim(box[1] - pad_y, box[3] + pad_y)
    _draw_graticule(axes, float(box[1] + box[3]) / 2)
    kept = int((inside["state"] == "kept").sum())
    prefix = f"{name}   " if name else ""
    axes.set_title(f"{prefix}{kept} of {len(inside)} chips kept", fontsize=9.5)


def _rings(table: pd.DataFrame) -> list[Floats]:
    parts = shapely.get_parts(np.asarray(table["geometry"].tolist(), dtype=object))
    polygons = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    return [shapely.get_coordinates(shapely.get_exterior_ring(p)) for p in polygons]


def _draw_legend(figure: Figure, items: pd.DataFrame, chips: pd.DataFrame) -> None:
    styles: list[tuple[str, Any]] = [("kept", "-"), ("dropped", "--"), ("quarantined", ":")]
    handles: list[Any] = [
        Patch(color=STATES[s], label=f"chip {s}") for s in STATES if (chips["state"] == s).any()
    ]
    for state, style in styles:
        if (items["state"] == state).any():
            colour = NEUTRAL if state == "kept" else STATES[state]
            handles.append(Line2D([], [], color=colour, ls=style, label=f"scene {state}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def project_vectors(vectors: NDArray[np.float32], seed: int = 0) -> tuple[Floats, str]:
    """Project vectors to two dimensions for display.

    From 50 vectors on the method is t-SNE on the first 50 principal components, otherwise the first
    two components. A single thread and a fixed seed make the result reproducible.

    Args:
        vectors: Vectors, shape (n, D).
        seed: Seed of t-SNE.

    Returns:
        Coordinates, shape (n, 2), and the name of the method.
    """
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(axis=0)
    parts = min(50, *centred.shape)
    with threadpool_limits(1):
        reduced = PCA(parts, svd_solver="full").fit_transform(centred)
        if len(vectors) < 50:
            flat = np.zeros((len(vectors), 2))
            flat[:, : min(2, parts)] = reduced[:, :2]
            return flat, "principal components"
        tsne = TSNE(
            perplexity=min(30.0, len(vectors) / 4),
            init="pca",
            random_state=seed,
            n_jobs=1,
            max_iter=600,
        )
        return np.asarray(tsne.fit_transform(reduced), dtype=np.float64), "t-SNE"


def mosaic_rows(flat: Floats, columns: int = 17, lines: int = 7) -> list[int]:
    """Select the points whose pictures are shown: in each cell of a grid, the most central one.

    Args:
        flat: Coordinates, shape (n, 2).
        columns: Columns of the grid.
        lines: Rows of the grid.
    """
    low, high = flat.min(axis=0), flat.max(axis=0)
    cells = np.array([columns, lines])
    scaled = (flat - low) / np.where(high > low, high - low, 1) * (cells - 1e-9)
    cell = scaled.astype(int)
    distance = ((scaled - cell - 0.5) ** 2).sum(axis=1)
    nearest: dict[tuple[int, int], int] = {}
    for row in np.argsort(distance, kind="stable"):
        nearest.setdefault((int(cell[row, 0]), int(cell[row, 1])), int(row))
    return sorted(nearest.values())


def plot_feature_space(
    flat: Floats,
    states: Sequence[str],
    collections: Sequence[str],
    pictures: dict[int, NDArray[np.uint8]],
    method: str,
) -> Picture:
    """Draw chips in feature space: by decision, by collection, and as thumbnails.

    Args:
        flat: Coordinates, shape (n, 2).
        states: State of each chip.
        collections: Collection of each chip.
        pictures: Picture of shape (H, W, 3) by row, for the thumbnails.
        method: Name of the projection.
    """
    with new_figure(8.6) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=[3.6, 4.8])
        colours = {s: STATES[s] for s in STATES if s in states}
        _draw_points(figure.add_subplot(grid[0, 0]), flat, states, colours, "By decision")
        names = sorted(set(collections))
        by_name = {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}
        _draw_points(figure.add_subplot(grid[0, 1]), flat, collections, by_name, "By collection")
        panel = figure.add_subplot(grid[1, :])
        panel.scatter(flat[:, 0], flat[:, 1], s=0)
        for row, picture in pictures.items():
            frame = {"edgecolor": STATES[states[row]], "linewidth": 1.6, "boxstyle": "square,pad=0"}
            image = OffsetImage(picture, zoom=36 / picture.shape[0], interpolation="lanczos")
            panel.add_artist(
                AnnotationBbox(image, (flat[row, 0], flat[row, 1]), bboxprops=frame, pad=0.06)
            )
        panel.margins(0.05, 0.08)
        panel.set_title("As pictures (frame: decision)")
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(True)
                spine.set_color(GRID)
        alt = f"{method} of {len(flat)} chip embeddings by decision and collection, with thumbnails"
        return save_figure(figure, "embedding", alt)


def _draw_points(
    axes: Axes, flat: Floats, groups: Sequence[str], colours: dict[str, str], title: str
) -> None:
    labels = np.asarray(groups)
    size = float(np.clip(6000 / max(len(flat), 1), 4, 26))
    for name, colour in reversed(colours.items()):
        selected = labels == name
        axes.scatter(
            flat[selected, 0],
            flat[selected, 1],
            s=size,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=f"{name} ({int(selected.sum())})",
        )
    axes.set_title(title)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        names[::-1],
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=2,
        markerscale=1.4,
        handletextpad=0.2,
        labelcolor=SOFT,
    )
