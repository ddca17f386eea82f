"""Versions of datasets and models: publish a new one, compare two, show the difference."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from data_catalog.artifact import Artifact, NotInStore
from data_catalog.catalogue import Catalogue, PublishedMeanwhile, UnknownReference
from data_catalog.database.items import read_items
from data_catalog.database.lease import aware
from data_catalog.database.schema import NameRow
from data_catalog.errors import CheckError, UsageError
from data_catalog.provenance.diff import (
    Difference,
    compare,
    other_changes,
    read_version,
    record_of,
    same_content,
)
from data_catalog.provenance.lineage import ancestor
from data_catalog.provenance.model_diff import ModelDifference, compare_models
from flows.cli.console import out, print_table

log = logging.getLogger("geofm.version")

#: Most rows of a table that are shown.
SHOWN = 10
#: Most waiting items that are named in a headline.
NAMED = 3
#: Difference of two clocks that is tolerated without a warning.
CLOCK_TOLERANCE = timedelta(seconds=60)


@dataclass(frozen=True)
class Published:
    """The version of a dataset or model at the end of a run.

    Attributes:
        new: Whether the run published it.
        difference: Difference to the version before; None for a first version.
        waiting: Items that are not in the version because they cannot be read yet, each with the
            reason and since when.
    """

    row: NameRow
    new: bool
    difference: Difference | ModelDifference | None = None
    waiting: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """Reference to the version: ``name@version``."""
        return f"{self.row.name}@{self.row.version}"

    def headline(self) -> str:
        """Return one line for people."""
        waiting = f"; {self._describe_waiting()}" if self.waiting else ""
        if not self.new:
            return f"no new version, nothing changed ({self.ref}){waiting}"
        change = self.difference.headline() if self.difference else "first version"
        return f"{self.ref} : {change}{waiting}"

    def _describe_waiting(self) -> str:
        number, more = len(self.waiting), ", ..." if len(self.waiting) > NAMED else ""
        subject = "1 item waits" if number == 1 else f"{number:,} items wait"
        return f"{subject} to be read ({', '.join(self.waiting[:NAMED])}{more})"

    def to_json(self) -> dict[str, Any]:
        """Return ``version``, ``diff`` and ``waiting`` of ``--json``."""
        version = {
            "ref": self.ref,
            "new": self.new,
            "digest": self.row.digest,
            "predecessor": self.row.predecessor,
        }
        diff = self.difference.summary() if self.difference else None
        return {"version": version, "diff": diff, "waiting": list(self.waiting)}


class NameTaken(UsageError):
    """A name is in use for an artifact of another kind."""


def check_name(catalogue: Catalogue, name: str, kind: str) -> None:
    """Refuse a name under which an artifact of another kind is published.

    Args:
        catalogue: The catalogue.
        name: Name of the dataset or model.
        kind: ``dataset`` or ``model``.

    Raises:
        NameTaken: The name is in use for the other kind.
    """
    newest = catalogue.newest(name)
    taken = kind if newest is None else catalogue.kind(newest.digest)
    if newest is not None and taken != kind:
        field = "pack.name" if kind == "dataset" else "pretrain.name"
        raise NameTaken(
            f"{field}: {name!r} is the name of a {taken} ({newest.name}@{newest.version}); give "
            f"the {kind} another name with --set {field}=…"
        )


def publish(catalogue: Catalogue, name: str, artifact: Artifact) -> Published:
    """Publish a dataset or model as ``name@today``, unless the newest version has the same content.

    Two datasets have the same content if their samples, licences and files are the same. The day is
    that of the database, so that machines with different clocks agree on it.

    Raises:
        NameTaken: The name is in use for an artifact of another kind.
    """
    check_name(catalogue, name, artifact.kind)
    while True:
        newest = catalogue.newest(name)
        _warn_of_clocks(catalogue, newest)
        if newest is not None and _has_same_content(catalogue, newest, artifact):
            return Published(newest, new=False)
        difference = _difference_to(catalogue, newest, artifact)
        summary = difference.summary() if difference else None
        day = catalogue.clock().strftime("%Y-%m-%d")
        after = 0 if newest is None else newest.number
        try:
            row = catalogue.publish(name, artifact, day, summary, after)
        except PublishedMeanwhile:
            log.info("version: %s has a newer version now; the comparison is repeated", name)
            continue
        return Published(row, new=True, difference=difference)


def announce(version: Published, artifact: Artifact) -> None:
    """Announce a version that the flow run of the caller has published.

    A new version is a Prefect event, to which automations can react, and an output of the run in
    OpenLineage. Prefect sends its events in the background and fails no run if it cannot.

    Args:
        version: The version; one that is not new is not announced.
        artifact: Its dataset or model.
    """
    if not version.new:
        return
    from prefect.events import emit_event

    from flows.open_lineage import report_published

    row, kind = version.row, artifact.kind
    # a model's rows are the chips that it was trained on
    chips = artifact.manifest.counts["rows_out"]
    emit_event(
        event=f"geofm.{kind}.published",
        resource={
            "prefect.resource.id": f"geofm.{kind}.{row.name}",
            "prefect.resource.name": row.name,
        },
        payload={"ref": version.ref, "digest": row.digest, "chips": chips},
    )
    report_published(artifact, row.name, row.version)


def _has_same_content(catalogue: Catalogue, newest: NameRow, artifact: Artifact) -> bool:
    """Return whether the newest version has the same content as an artifact."""
    if newest.digest == artifact.digest or artifact.kind != "dataset":
        return newest.digest == artifact.digest
    try:
        return same_content(catalogue.get(newest.digest), artifact)
    except (CheckError, OSError, NotInStore, UnknownReference) as error:
        log.warning("%s@%s cannot be compared: %s", newest.name, newest.version, error)
        return False


def published_dataset(catalogue: Catalogue, reference: str) -> Published:
    """Return a published version of a dataset.

    Args:
        catalogue: The catalogue.
        reference: ``name``, ``name@version`` or a digest.

    Raises:
        UnknownReference: Nothing is published under the reference.
        UsageError: It is the version of a model.
    """
    row = catalogue.version_of(reference)
    kind = catalogue.kind(row.digest)
    if kind != "dataset":
        raise UsageError(f"dataset: {reference} is a {kind}; `geofm list` shows the datasets")
    return Published(row, new=False)


def waiting_items(catalogue: Catalogue, dataset: Artifact) -> tuple[str, ...]:
    """List the items of a dataset's search that cannot be read yet, with reason and since when."""
    items, chips = (ancestor(catalogue, dataset, kind) for kind in ("items", "chips"))
    entries = sorted(read_items(catalogue, record_of(items, chips)).items())
    return tuple(
        f"{key[1]}: {entry.state.reason} since {entry.since:%Y-%m-%d}"
        for key, entry in entries
        if entry.state.is_retried
    )


def _warn_of_clocks(catalogue: Catalogue, newest: NameRow | None) -> None:
    """Warn if this machine's clock, or the clock of an earlier publication, is wrong."""
    time = catalogue.clock()
    offset = datetime.now(UTC) - time
    if abs(offset) > CLOCK_TOLERANCE:
        log.warning(
            "clock: this machine is %.0f s %s the database's clock; set it right (versions are "
            "ordered by their predecessors, so none is lost)",
            abs(offset).total_seconds(),
            "ahead of" if offset > timedelta(0) else "behind",
        )
    ahead = timedelta(0) if newest is None else aware(newest.created_at) - time
    if newest is not None and ahead > CLOCK_TOLERANCE:
        log.warning(
            "clock: %s@%s carries a time that is %.0f s ahead of the database's clock: a clock was "
            "wrong when it was published, or is now (versions are ordered by their predecessors, "
            "so the next one is still the newest)",
            newest.name,
            newest.version,
            ahead.total_seconds(),
        )


def _difference_to(
    catalogue: Catalogue, newest: NameRow | None, artifact: Artifact
) -> Difference | ModelDifference | None:
    """Return the difference to the newest version; None if there is none, or it can't be read."""
    if newest is None:
        return None
    try:
        return _compare(catalogue, catalogue.get(newest.digest), artifact)
    except (CheckError, OSError, NotInStore, UnknownReference) as error:
        log.warning("%s@%s cannot be compared: %s", newest.name, newest.version, error)
        return None


def _compare(
    catalogue: Catalogue, before: Artifact, after: Artifact
) -> Difference | ModelDifference:
    """Compare two artifacts: two models, or the datasets that they were made from."""
    if before.kind == after.kind == "model":
        return compare_models(catalogue, before, after)
    difference = compare(read_version(catalogue, before), read_version(catalogue, after))
    if difference.added or difference.removed or difference.items:
        return difference
    old, new = (ancestor(catalogue, artifact, "dataset") for artifact in (before, after))
    if same_content(old, new):
        return difference
    return replace(difference, notes=other_changes(old, new))


def difference_between(catalogue: Catalogue, old: str, new: str) -> Difference | ModelDifference:
    """Compare two references; if ``new`` is empty, compare ``old`` with its predecessor.

    Raises:
        UsageError: The version has no predecessor.
    """
    if not new:
        version = catalogue.version_of(old)
        if version.predecessor is None:
            raise UsageError(
                f"{version.name}@{version.version} is the first version; give two: "
                "`geofm diff OLD NEW`"
            )
        old, new = f"{version.name}@{version.predecessor}", f"{version.name}@{version.version}"
    return _compare(catalogue, catalogue.resolve(old), catalogue.resolve(new))


class DifferenceTable(NamedTuple):
    """A table of a difference, for the terminal or the Prefect UI."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def difference_tables(difference: Difference | ModelDifference) -> list[DifferenceTable]:
    """Return a difference as tables; empty tables are left out."""
    if isinstance(difference, ModelDifference):
        return _model_tables(difference)
    names = ["source", "collection", "added", "removed", "kept"]
    sources = [[row[name] for name in names] for row in difference.by_source]
    reasons = [["+", number, reason] for reason, number in difference.why_added.items()]
    reasons += [["−", number, reason] for reason, number in difference.why_removed.items()]
    item_names = ["change", "collection", "item_id", "by", "samples", "reason", "since"]
    by_samples = sorted(difference.items, key=lambda item: -item["samples"])
    items = [[item[name] for name in item_names] for item in by_samples]
    cells = [[row["cell"], row["added"], row["removed"]] for row in difference.by_cell]
    tables = [
        _shortened("By source", names, sources),
        _shortened("Why", ["", "samples", "reason"], reasons),
        _shortened("Items", [name.removesuffix("_id") for name in item_names], items),
        _shortened("Ground cells", ["cell", "added", "removed"], cells),
    ]
    return [table for table in tables if table.rows]


def _shortened(title: str, columns: list[str], rows: list[list[Any]]) -> DifferenceTable:
    """Return a table with its first ``SHOWN`` rows; the title has the number of all rows."""
    shown = [[str(value) for value in row] for row in rows[:SHOWN]]
    if len(rows) > SHOWN:
        title = f"{title} ({SHOWN} of {len(rows):,})"
    return DifferenceTable(title, columns, shown)


def _model_tables(difference: ModelDifference) -> list[DifferenceTable]:
    """Return a difference of models as tables, with those of their datasets."""
    tables = []
    for name in ("settings", "inputs", "weights", "facts", "software"):
        pairs = getattr(difference, name)
        rows = [[key, *(str(value) for value in pair)] for key, pair in pairs.items()]
        if rows:
            tables.append(DifferenceTable(name.capitalize(), ["what", "from", "to"], rows))
    return [*tables, *(difference_tables(difference.dataset) if difference.dataset else [])]


def print_difference(difference: Difference | ModelDifference) -> None:
    """Print a difference in the terminal."""
    kept = f", kept {difference.kept:,}" if isinstance(difference, Difference) else ""
    out.print(f"{difference.headline()}{kept}", highlight=False)
    for table in difference_tables(difference):
        print_table(table.title, table.columns, table.rows)


def version_markdown(published: Published) -> str:
    """Return a version and its difference as Markdown for the Prefect UI."""
    lines = [f"### {published.headline()}", ""]
    for table in difference_tables(published.difference) if published.difference else []:
        lines += [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |"]
        lines += ["|" + "---|" * len(table.columns)]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in table.rows]
        lines += [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Replace the characters of a text that would end or format a Markdown table cell."""
    plain = "".join(c if c.isprintable() and c not in "|<>`[]" else " " for c in text)
    return plain or " "
