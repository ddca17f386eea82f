"""Canonical JSON and SHA-256: the two functions that give everything its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from upath import UPath


def canonical(value: Any) -> bytes:
    """The one JSON encoding of a value: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: for NaN and infinities, which JSON cannot hold.
        TypeError: for anything JSON does not know.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8", errors="surrogatepass")


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path | UPath) -> str:
    """SHA-256 (hex) of a file's bytes, local or remote, read in blocks that stay in the cache."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**16):
            total.update(block)
    return total.hexdigest()
