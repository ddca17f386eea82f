"""The lineage as an SVG drawing: boxes from the sources to the scores, each with its digest."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from data_catalog.artifact import Artifact
from geofm.runtime.text import count

#: Width and height of a box, horizontal and vertical distance of boxes, and margin, in pixels.
_WIDTH, _HEIGHT, _STEP_X, _STEP_Y, _MARGIN = 180, 66, 222, 124, 12
_COLUMNS, _ROWS = 5, 4

#: Column and row of each role's box.
_CELLS = {
    "sources": (0, 0),
    "items": (1, 0),
    "chips": (2, 0),
    "embeddings": (3, 0),
    "encoder": (4, 0),
    "descriptors": (2, 1),
    "pool": (3, 1),
    "pairs": (4, 1),
    "calibration": (4, 2),
    "decisions": (3, 2),
    "dataset": (2, 2),
    "model": (1, 2),
    "teacher": (0, 2),
    "scores": (1, 3),
}
#: Noun for the rows of each artifact.
_ROW_NOUNS = {
    "items": "scenes",
    "chips": "chips",
    "embeddings": "vectors",
    "descriptors": "chips",
    "pool": "candidates",
    "calibration": "known pairs",
    "pairs": "vectors",
    "decisions": "kept",
    "dataset": "samples",
    "model": "samples seen",
    "scores": "images",
}
#: Edges that are not drawn because a longer path contains them. The table lists all inputs.
_REDUNDANT = {
    ("items", "dataset"),
    ("dataset", "scores"),
    ("chips", "decisions"),
    ("chips", "dataset"),
    ("chips", "pool"),
    ("embeddings", "pool"),
    ("descriptors", "decisions"),
    ("embeddings", "decisions"),
    ("pool", "decisions"),
    ("items", "calibration"),
    ("chips", "calibration"),
    ("descriptors", "calibration"),
    ("embeddings", "calibration"),
    ("calibration", "pairs"),
}
#: Edges that pass through an artifact that is not drawn (the buckets).
_INDIRECT = {("pool", "pairs"), ("calibration", "decisions")}


def draw_lineage(artifacts: Mapping[str, Artifact], sources: list[str]) -> str:
    """Draw the lineage as inline SVG; text from outside is escaped.

    Args:
        artifacts: Artifacts by role.
        sources: Names of the imagery sources.
    """
    boxes = {"sources": ("sources", ", ".join(sources) or "unknown", "")}
    for role, artifact in artifacts.items():
        if role in _CELLS:
            rows = artifact.manifest.counts.get("rows_out")
            size = "" if rows is None else f"{count(rows)} {_ROW_NOUNS[role]}"
            boxes[role] = (role, artifact.digest[:12], size)
    edges = [("sources", "items")]
    for role, artifact in artifacts.items():
        parents = [p for p in artifact.manifest.inputs if p in boxes]
        edges += [(p, role) for p in parents if role in boxes and (p, role) not in _INDIRECT]
    edges += sorted(_INDIRECT)
    for role, child, name, sha256 in (
        ("encoder", "embeddings", "encoder", "weights_sha256"),
        ("teacher", "model", "teacher", "teacher_weights_sha256"),
    ):
        if child in artifacts:
            facts = artifacts[child].manifest.facts
            boxes[role] = (role, str(facts.get(name, "?")), str(facts.get(sha256, ""))[:12])
            edges.append((role, child))
    width = (_COLUMNS - 1) * _STEP_X + _WIDTH + 2 * _MARGIN
    height = (_ROWS - 1) * _STEP_Y + _HEIGHT + 2 * _MARGIN
    present = [(a, b) for a, b in edges if a in boxes and b in boxes]
    shapes = [_draw_edge(a, b) for a, b in present if (a, b) not in _REDUNDANT]
    shapes += [_draw_box(role, *text) for role, text in boxes.items()]
    label = "Lineage: " + "; ".join(f"{a} to {b}" for a, b in present)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#7B8794"/>'
        f"</marker></defs>{''.join(shapes)}</svg>"
    )


def _corner(role: str) -> tuple[int, int]:
    """Upper left corner of a role's box, in pixels."""
    column, row = _CELLS[role]
    return _MARGIN + column * _STEP_X, _MARGIN + row * _STEP_Y


def _draw_edge(parent: str, child: str) -> str:
    (x1, y1), (x2, y2) = _corner(parent), _corner(child)
    if y1 == y2:
        start, end = (x1 + _WIDTH, x2 - 3) if x1 < x2 else (x1, x2 + _WIDTH + 3)
        path = f"M{start} {y1 + _HEIGHT / 2}H{end}"
    else:
        middle = (y1 + _HEIGHT + y2) / 2
        path = f"M{x1 + _WIDTH / 2} {y1 + _HEIGHT}V{middle}H{x2 + _WIDTH / 2}V{y2 - 3}"
    return f'<path d="{path}" fill="none" stroke="#7B8794" marker-end="url(#tip)"/>'


def _draw_box(role: str, title: str, first: str, second: str) -> str:
    x, y = _corner(role)
    external = role in ("sources", "encoder", "teacher")
    fill, stroke = ("#FFFFFF", "#9AA5B1") if external else ("#EEF4FA", "#0072B2")
    dash = ' stroke-dasharray="4 3"' if external else ""
    lines = [
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{fill}" '
        f'stroke="{stroke}"{dash}/>',
        f'<text x="{x + 12}" y="{y + 21}" class="lin-title">{escape(title)}</text>',
    ]
    for number, text in enumerate((first, second)):
        short = text if len(text) <= 24 else text[:23] + "…"
        lines.append(
            f'<text x="{x + 12}" y="{y + 39 + 16 * number}" class="lin-text">'
            f"<title>{escape(text)}</title>{escape(short)}</text>"
        )
    return "".join(lines)
