"""Limit the depth of JSON, so that one item that is too deep does not invalidate its page."""

from __future__ import annotations

import re

#: Levels that are kept; a page of items with an ordinary geometry has about ten.
MAX_LEVELS = 200
# Possessive quantifiers: backtracking over a text of 10 MB would take 1 GB of memory.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def shallow(text: str) -> str:
    """Replace everything deeper than `MAX_LEVELS` by ``NaN``.

    NaN is not JSON, so an item that holds it is refused as ``not_json``.
    """
    kept, level, done, start = [], 0, 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            level += 1
            if level == MAX_LEVELS + 1:
                start = token.start()
        elif token[0] in "]}":
            if level == MAX_LEVELS + 1:
                kept += [text[done:start], "NaN"]
                done = token.end()
            level -= 1
    return "".join([*kept, text[done:]])
