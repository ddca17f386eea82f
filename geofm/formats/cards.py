"""What Hugging Face reads at the top of a card, of datasets and of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
#: Licences that the hub knows, by the name SPDX gives them.
KNOWN = {
    name: name.lower()
    for name in (
        "Apache-2.0", "MIT", "CC0-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0",
        "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
        "CC-BY-ND-4.0", "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0",
        "CC-BY-NC-SA-4.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
    )
} | {"ODbL-1.0": "odbl", "ODC-By-1.0": "odc-by", "PDDL-1.0": "pddl"}  # fmt: skip


def terms_of_use(terms: Sequence[str]) -> dict[str, str]:
    """The licence fields for a union of terms (SPDX): the hub's own name where it has one."""
    if not terms:
        return {"license": "unknown"}
    if len(terms) == 1 and terms[0] in KNOWN:
        return {"license": KNOWN[terms[0]]}
    return {"license": "other", "license_name": " AND ".join(terms)}


def write_card(folder: Path, about: Mapping[str, Any], text: str) -> None:
    """Write ``README.md`` with its YAML head; a file that was linked is not written through."""
    head = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True)
    (folder / CARD).unlink(missing_ok=True)
    (folder / CARD).write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")
