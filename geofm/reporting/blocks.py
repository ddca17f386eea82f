"""Parts of a section: each kind of block has its look in ``templates/page_layout.html.j2``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from geofm.reporting.plots import Picture


@dataclass(frozen=True)
class Note:
    """A sentence."""

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
    """A table of text.

    Attributes:
        head: Column titles.
        rows: Cells, one sequence per row.
        numeric: Columns that are aligned right.
        strong: Rows that are highlighted.
        code: Columns of identifiers that may be broken into lines.
        names: Columns of identifiers that must stay on one line.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    names: frozenset[int] = frozenset()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Thumbnail:
    """Picture of a chip with a short caption; the state gives the colour of its frame."""

    png: bytes
    alt: str
    caption: str
    state: str


@dataclass(frozen=True)
class Gallery:
    """A heading, a sentence, and thumbnails in rows."""

    title: str
    text: str
    thumbs: Sequence[Thumbnail]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class GalleryGrid:
    """Short galleries, two beside each other on wide screens."""

    galleries: Sequence[Gallery]
    kind: ClassVar[str] = "gallery_grid"


@dataclass(frozen=True)
class Diagram:
    """An inline SVG drawing, made by this package and never from outside."""

    svg: str
    caption: str
    kind: ClassVar[str] = "diagram"


@dataclass(frozen=True)
class FactList:
    """Names and values side by side."""

    title: str
    pairs: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "facts"


Block = Note | Plot | Table | Gallery | GalleryGrid | Diagram | FactList


@dataclass(frozen=True)
class Collapsible:
    """Blocks that are hidden until the reader opens them."""

    title: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "collapsible"


@dataclass(frozen=True)
class PageSection:
    """A section of the page: anchor, title, its result in a sentence, and blocks."""

    id: str
    title: str
    lead: str
    blocks: Sequence[Block | Collapsible] = field(default_factory=tuple)


@dataclass(frozen=True)
class HeadlineCard:
    """A figure at the top of the page."""

    label: str
    value: str
    note: str = ""
