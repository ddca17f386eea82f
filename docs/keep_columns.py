"""A griffe extension for the site: lists in columns in module docstrings keep their columns."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

#: A line that continues after two spaces or more, such as ``plan    choose the windows``.
COLUMNS = re.compile(r"^\s*\S.*?\S\s{2,}\S")


def fence_columns(text: str) -> str:
    """Put each paragraph with at least two lines in columns into a code block."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if sum(bool(COLUMNS.match(line)) for line in lines) >= 2:
            head = [] if COLUMNS.match(lines[0]) else [lines.pop(0), ""]
            columns = textwrap.dedent("\n".join(lines))
            lines = [*head, "```text", columns, "```"]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


class KeepColumns(griffe.Extension):
    """Change the docstrings of modules before they are parsed."""

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Fence the columns of one module's docstring."""
        if mod.docstring is not None:
            mod.docstring.value = fence_columns(mod.docstring.value)
