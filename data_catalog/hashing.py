"""Canonical JSON and SHA-256: every digest and key of the record is made with these functions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from upath import UPath


def canonical(value: Any) -> bytes:
    """Encode a value as canonical JSON: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: The value holds NaN or an infinity, which JSON cannot represent.
        TypeError: The value holds something that JSON cannot represent.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8", errors="surrogatepass")


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_file(path: Path | UPath) -> str:
    """Return the SHA-256 (hex) of a file, local or remote.

    The file is read in blocks of 64 KiB, which fit into the processor's cache.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**16):
            digest.update(block)
    return digest.hexdigest()
