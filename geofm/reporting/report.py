"""Stage `report`: all artifacts of a run -> one HTML page.

plan    none
seal    read the tables of the artifacts         (report_data.py)
        make the sections                        (record_, data_, curation_, model_sections.py)
        put them into one page                   (page.py, templates/)

The page shows times and energy from the catalogue's run records. Two runs over the same artifacts
therefore make different pages, and the manifest marks the report as not deterministic.
"""

from __future__ import annotations

from pathlib import Path

from data_catalog.provenance.costs import costs_at
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from geofm.reporting.report_data import ROLES


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``report.html``, and its figures as PNG files."""
    from geofm.reporting.page import build_page

    digests = [artifact.digest for artifact in job.inputs.values()]
    page = build_page(job.inputs, job.settings, costs_at(job.catalogue, job.store, digests))
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
    version="6",
    kind="report",
    inputs=ROLES,
    software=("matplotlib", "jinja2", "scikit-learn", "pillow"),
    plan=no_parts,
    work=no_work,
    seal=seal,
)
