from __future__ import annotations

import json
import math

from geofm.remote.json import MAX_LEVELS, shallow


def test_only_what_is_deep_is_left_out() -> None:
    brackets = r'{"a\"]}{": "\\", "[[[": ["}}}"]}'
    assert shallow(brackets) == brackets
    edge = "[" * MAX_LEVELS + "]" * MAX_LEVELS
    assert shallow(edge) == edge
    deep = "[" * 100_000 + '"]"' + "]" * 100_000
    page = json.loads(shallow(f'{{"one": {deep}, "two": {deep}, "three": {brackets}}}'))
    assert page["three"] == json.loads(brackets)
    for name in ("one", "two"):
        value, levels = page[name], 0
        while isinstance(value, list):
            value, levels = value[0], levels + 1
        assert math.isnan(value)
        assert levels == MAX_LEVELS - 1


def test_what_never_ends_is_left_as_it_is() -> None:
    for text in ("[" * 500, "]" * 500, '"' + "[" * 500, '"' + r"\"" * 500_000, ""):
        assert shallow(text) == text
