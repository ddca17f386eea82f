"""JSON that is nested deeper than Python reads: it spoils the item it is in, not the whole page."""

from __future__ import annotations

import re

#: Levels that are kept; a page of items with a usual geometry has about ten.
MAX_LEVELS = 200
# possessive, or a text of 10 MB would cost 1 GB to remember ways back
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def shallow(text: str) -> str:
    """The same JSON with ``NaN`` for what lies deeper than :data:`MAX_LEVELS`.

    NaN is no JSON, so an item that holds one is refused as ``not_json``.
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
