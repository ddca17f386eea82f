"""Cards of datasets and models, with the YAML head that Hugging Face reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"


def write_card(folder: Path, front_matter: Mapping[str, Any], text: str) -> None:
    """Write ``README.md`` with its YAML head.

    An existing file is removed first, because it may be a hard link to a file of an artifact.
    """
    head = yaml.safe_dump(dict(front_matter), sort_keys=False, allow_unicode=True)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
