"""The lineage as a drawing: from the sources to the scores, every box with its digest."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from data_catalog.artifact import Artifact
from geofm.runtime.text import count

_W, _H, _DX, _DY, _PAD = 180, 66, 222, 124, 12

#: Role -> column and row of its box.
_PLACES = {
    "sources": (0, 0), "items": (1, 0), "chips": (2, 0), "embeddings": (3, 0), "encoder": (4, 0),
    "descriptors": (2, 1), "pool": (3, 1), "pairs": (4, 1), "calibration": (4, 2),
    "decisions": (3, 2), "dataset": (2, 2), "model": (1, 2), "teacher": (0, 2), "scores": (1, 3),
}  # fmt: skip

_SAID = {
    "items": "scenes", "chips": "chips", "embeddings": "vectors", "descriptors": "chips",
    "pool": "candidates", "calibration": "known pairs", "pairs": "vectors", "decisions": "kept",
    "dataset": "samples", "model": "samples seen", "scores": "images",
}  # fmt: skip

#: Edges left out of the drawing because the longer way says them (the table has them all).
_IMPLIED = {
    ("items", "dataset"), ("dataset", "scores"), ("chips", "decisions"), ("chips", "dataset"),
    ("chips", "pool"), ("embeddings", "pool"), ("descriptors", "decisions"),
    ("embeddings", "decisions"), ("pool", "decisions"), ("items", "calibration"),
    ("chips", "calibration"), ("descriptors", "calibration"), ("embeddings", "calibration"),
    ("calibration", "pairs"),
}  # fmt: skip
#: Edges that lead through an artifact which is not drawn (the cells that pairs are searched in).
_THROUGH = {("pool", "pairs"), ("calibration", "decisions")}


def draw(artifacts: Mapping[str, Artifact], sources: list[str]) -> str:
    """The chain as inline SVG; text that came from outside is escaped.

    Args:
        artifacts: by role.
        sources: names of the imagery sources.
    """
    boxes = {"sources": ("sources", ", ".join(sources) or "unknown", "")}
    for role, artifact in artifacts.items():
        if role in _PLACES:
            rows = artifact.manifest.counts.get("rows_out")
            said = "" if rows is None else f"{count(rows)} {_SAID[role]}"
            boxes[role] = (role, artifact.digest[:12], said)
    edges = [("sources", "items")]
    for role, artifact in artifacts.items():
        parents = [p for p in artifact.manifest.inputs if p in boxes]
        edges += [(p, role) for p in parents if role in boxes and (p, role) not in _THROUGH]
    edges += sorted(_THROUGH)
    for role, child, name, sha in (
        ("encoder", "embeddings", "encoder", "weights_sha256"),
        ("teacher", "model", "teacher", "teacher_weights_sha256"),
    ):
        if child in artifacts:
            facts = artifacts[child].manifest.facts
            boxes[role] = (role, str(facts.get(name, "?")), str(facts.get(sha, ""))[:12])
            edges.append((role, child))
    columns, lines = 5, 4
    width, height = (columns - 1) * _DX + _W + 2 * _PAD, (lines - 1) * _DY + _H + 2 * _PAD
    drawn = [_edge(a, b) for a, b in edges if a in boxes and b in boxes and not _implied(a, b)]
    drawn += [_box(role, *text) for role, text in boxes.items()]
    label = "Lineage: " + "; ".join(f"{a} to {b}" for a, b in edges if a in boxes and b in boxes)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#7B8794"/>'
        f"</marker></defs>{''.join(drawn)}</svg>"
    )


def _implied(parent: str, child: str) -> bool:
    """Whether an edge is left out of the drawing."""
    return (parent, child) in _IMPLIED


def _corner(role: str) -> tuple[int, int]:
    column, row = _PLACES[role]
    return _PAD + column * _DX, _PAD + row * _DY


def _edge(parent: str, child: str) -> str:
    (x1, y1), (x2, y2) = _corner(parent), _corner(child)
    if y1 == y2:
        start, end = (x1 + _W, x2 - 3) if x1 < x2 else (x1, x2 + _W + 3)
        path = f"M{start} {y1 + _H / 2}H{end}"
    else:
        middle = (y1 + _H + y2) / 2
        a, b = x1 + _W / 2, x2 + _W / 2
        path = f"M{a} {y1 + _H}V{middle}H{b}V{y2 - 3}"
    return f'<path d="{path}" fill="none" stroke="#7B8794" marker-end="url(#tip)"/>'


def _box(role: str, title: str, first: str, second: str) -> str:
    x, y = _corner(role)
    outside = role in ("sources", "encoder", "teacher")
    fill, stroke = ("#FFFFFF", "#9AA5B1") if outside else ("#EEF4FA", "#0072B2")
    dash = ' stroke-dasharray="4 3"' if outside else ""
    lines = [
        f'<rect x="{x}" y="{y}" width="{_W}" height="{_H}" rx="6" fill="{fill}" '
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
