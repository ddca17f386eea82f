"""The server of the shared development world."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(shared: Path, *words: str) -> Iterator[str]:
    """Serve the shared development world until the block ends; yields the address."""
    script = shared / "worlds" / "serve_world.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(shared / "worlds" / "dev"), "--port", "0", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip().rstrip("/")
    finally:
        process.terminate()
        process.wait(10)
