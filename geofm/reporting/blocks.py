"""What a section of the page is made of; the template knows how each kind of block looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from geofm.reporting.plots import Picture


@dataclass(frozen=True)
class Note:
    """A sentence, also the one that stands where there is nothing to show."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Plot:
    """A figure with its caption."""

    picture: Picture
    caption: str
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Table:
    """Rows of text; ``numeric`` columns are aligned right, ``strong`` rows are set off.

    ``names`` are columns of identifiers that must not be broken, ``code`` those that may be.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    names: frozenset[int] = frozenset()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Thumb:
    """One chip's picture with a short caption; ``state`` colours its frame."""

    png: bytes
    alt: str
    caption: str
    state: str


@dataclass(frozen=True)
class Thumbs:
    """A row of chips that wraps, under a heading of its own."""

    title: str
    text: str
    thumbs: Sequence[Thumb]
    kind: ClassVar[str] = "thumbs"


@dataclass(frozen=True)
class Clusters:
    """Several short rows of chips, two beside each other where the screen is wide enough."""

    groups: Sequence[Thumbs]
    kind: ClassVar[str] = "clusters"


@dataclass(frozen=True)
class Graph:
    """An inline SVG drawing, made by this package (never from outside)."""

    svg: str
    caption: str
    kind: ClassVar[str] = "graph"


@dataclass(frozen=True)
class Facts:
    """Names and values side by side."""

    title: str
    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


Plain = Note | Plot | Table | Thumbs | Clusters | Graph | Facts


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    title: str
    blocks: Sequence[Plain]
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Section:
    """A section: its anchor, title, the finding in a sentence, and blocks."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Plain | Fold] = field(default_factory=tuple)


@dataclass(frozen=True)
class Card:
    """A headline number."""

    label: str
    value: str
    note: str = ""
