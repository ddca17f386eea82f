"""What Hugging Face reads at the top of a card, of datasets and of models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"


def write_card(folder: Path, about: Mapping[str, Any], text: str) -> None:
    """Write ``README.md`` with its YAML head; a file that was linked is not written through."""
    head = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
