"""Stage ``report``: the page of pictures for one run.

It shows times and energy from the catalogue's run records, so two runs over the same artifacts
make pages that differ: the manifest says that it is not deterministic.
"""

from __future__ import annotations

from pathlib import Path

from data_catalog.provenance.costs import costs
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from geofm.reporting.page import build_page
from geofm.reporting.record_sections import ROLES


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``report.html`` and the figures as PNG files."""
    digests = [artifact.digest for artifact in job.inputs.values()]
    page = build_page(job.inputs, job.settings, costs(job.catalogue, digests))
    (folder / "report.html").write_text(page.html, encoding="utf-8")
    for name, png in sorted(page.pictures.items()):
        (folder / name).write_bytes(png)
    return Sealed(
        counts={"rows_in": 0, "rows_out": 0, "pictures": len(page.pictures)},
        facts={"page": "report.html", "pictures": sorted(page.pictures)},
        deterministic=False,
    )


STAGE = Stage(
    name="report",
    version="5",
    kind="report",
    inputs=ROLES,
    software=("matplotlib", "jinja2", "scikit-learn", "pillow"),
    plan=no_parts,
    work=no_work,
    seal=seal,
)
