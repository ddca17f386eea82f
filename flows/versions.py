"""Versions of datasets and models: published only when new, each with what it changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

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

#: Rows of a table that are shown.
SHOWN = 10
#: Waiting items that are named in a headline.
NAMED = 3
#: Difference of two clocks from which it is reported.
CLOCK_TOLERANCE = timedelta(seconds=60)


@dataclass(frozen=True)
class Published:
    """A version at the end of a run: whether it is new, and what it changed."""

    row: NameRow
    new: bool
    difference: Difference | ModelDifference | None = None
    #: Items that are not in the version because they can't be read yet, each in a few words.
    waiting: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.row.name}@{self.row.version}"

    def headline(self) -> str:
        """One line for people."""
        told = f"; {self._waiting()}" if self.waiting else ""
        if not self.new:
            return f"no new version, nothing changed ({self.ref}){told}"
        change = self.difference.headline() if self.difference else "first version"
        return f"{self.ref} : {change}{told}"

    def _waiting(self) -> str:
        number, more = len(self.waiting), ", ..." if len(self.waiting) > NAMED else ""
        what = "1 item waits" if number == 1 else f"{number:,} items wait"
        return f"{what} to be read ({', '.join(self.waiting[:NAMED])}{more})"

    def to_json(self) -> dict[str, Any]:
        """``version`` and ``diff`` of ``--json``."""
        row = self.row
        version = {"ref": self.ref, "new": self.new, "digest": row.digest,
                   "predecessor": row.predecessor}  # fmt: skip
        diff = self.difference.summary() if self.difference else None
        return {"version": version, "diff": diff, "waiting": list(self.waiting)}


class NameTaken(UsageError):
    """A name is that of an artifact of another kind."""


def check_name(catalogue: Catalogue, name: str, kind: str) -> None:
    """Refuse a name under which something of another kind is published.

    Args:
        catalogue: where it would be published.
        name: of the dataset or model.
        kind: ``dataset`` or ``model``.

    Raises:
        NameTaken: names the field and the remedy.
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
    """Publish a dataset or model under ``name@today``, unless the newest version holds the same.

    Raises:
        NameTaken: the name is that of something of another kind.

    A dataset holds the same if its samples, their licences and its files are the same, whatever
    came and went beside them. The day is the database's, so that machines whose clocks differ
    agree on it.
    """
    check_name(catalogue, name, artifact.kind)
    while True:
        newest = catalogue.newest(name)
        _warn_of_clocks(catalogue, newest)
        if newest is not None and _holds(catalogue, newest, artifact):
            return Published(newest, new=False)
        difference = _against(catalogue, newest, artifact)
        summary = difference.summary() if difference else None
        day = catalogue.clock().strftime("%Y-%m-%d")
        after = 0 if newest is None else newest.number
        try:
            row = catalogue.publish(name, artifact, day, summary, after)
        except PublishedMeanwhile:
            log.info("version: %s has a newer version now, comparing again", name)
            continue
        return Published(row, new=True, difference=difference)


def _holds(catalogue: Catalogue, newest: NameRow, dataset: Artifact) -> bool:
    """Whether the newest version holds the same samples as a dataset."""
    if newest.digest == dataset.digest or dataset.kind != "dataset":
        return newest.digest == dataset.digest
    try:
        return same_content(catalogue.get(newest.digest), dataset)
    except (CheckError, OSError, NotInStore, UnknownReference) as error:
        log.warning("%s@%s can't be compared with: %s", newest.name, newest.version, error)
        return False


def waiting_items(catalogue: Catalogue, dataset: Artifact) -> tuple[str, ...]:
    """The items of a dataset's search that can't be read yet, with the reason and since when."""
    items, chips = (ancestor(catalogue, dataset, kind) for kind in ("items", "chips"))
    entries = sorted(read_items(catalogue, record_of(items, chips)).items())
    return tuple(
        f"{key[1]}: {entry.state.reason} since {entry.since:%Y-%m-%d}"
        for key, entry in entries
        if entry.state.asked_again
    )


def _warn_of_clocks(catalogue: Catalogue, newest: NameRow | None) -> None:
    """Warn when this machine's clock or that of an earlier publication is found to be off."""
    time = catalogue.clock()
    off = datetime.now(UTC) - time
    if abs(off) > CLOCK_TOLERANCE:
        log.warning(
            "clock: this machine is %.0f s %s the database's clock; set it right (versions are "
            "ordered by their predecessors, so none is lost)",
            abs(off).total_seconds(),
            "ahead of" if off > timedelta(0) else "behind",
        )
    ahead = timedelta(0) if newest is None else aware(newest.created_at) - time
    if newest is not None and ahead > CLOCK_TOLERANCE:
        log.warning(
            "clock: %s@%s carries a time that is %.0f s ahead of the database's clock: a clock was "
            "wrong when it was published, or is now (versions are ordered by their predecessors, "
            "so the next one is still the newest)",
            newest.name, newest.version, ahead.total_seconds(),
        )  # fmt: skip


def _against(
    catalogue: Catalogue, newest: NameRow | None, artifact: Artifact
) -> Difference | ModelDifference | None:
    """The difference to the newest version; None where there is none, or not in the store."""
    if newest is None:
        return None
    try:
        return _compare(catalogue, catalogue.get(newest.digest), artifact)
    except (CheckError, OSError, NotInStore, UnknownReference) as error:
        log.warning("%s@%s can't be compared with: %s", newest.name, newest.version, error)
        return None


def _compare(
    catalogue: Catalogue, before: Artifact, after: Artifact
) -> Difference | ModelDifference:
    if before.kind == after.kind == "model":
        return compare_models(catalogue, before, after)
    found = compare(read_version(catalogue, before), read_version(catalogue, after))
    if found.added or found.removed or found.items:
        return found
    old, new = (ancestor(catalogue, one, "dataset") for one in (before, after))
    return found if same_content(old, new) else replace(found, notes=other_changes(old, new))


def difference_between(catalogue: Catalogue, old: str, new: str) -> Difference | ModelDifference:
    """The difference from one REF to another; from its predecessor to one where ``new`` is empty.

    Raises:
        UsageError: there is no predecessor.
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


def _model_tables(found: ModelDifference) -> list[tuple[str, list[str], list[list[str]]]]:
    """A difference of models as tables: title, columns, rows."""
    tables = [
        ("Settings", found.settings), ("Inputs", found.inputs), ("Weights", found.weights),
        ("Facts", found.facts), ("Software", found.software),
    ]  # fmt: skip
    shown = [
        (title, ["what", "from", "to"],
         [[name, *(str(value) for value in pair)] for name, pair in pairs.items()])
        for title, pairs in tables
        if pairs
    ]  # fmt: skip
    return [*shown, *(tables_of(found.dataset) if found.dataset else [])]


def tables_of(
    found: Difference | ModelDifference,
) -> list[tuple[str, list[str], list[list[str]]]]:
    """A difference as tables: title, columns, rows."""
    if isinstance(found, ModelDifference):
        return _model_tables(found)
    by_source = [[r["source"], r["collection"], r["added"], r["removed"], r["kept"]]
                 for r in found.by_source]  # fmt: skip
    why = [["+", n, reason] for reason, n in found.why_added.items()]
    why += [["−", n, reason] for reason, n in found.why_removed.items()]
    items = [[i["change"], i["collection"], i["item_id"], i["by"], i["samples"], i["reason"],
              i["since"]] for i in sorted(found.items, key=lambda i: -i["samples"])]  # fmt: skip
    cells = [[r["cell"], r["added"], r["removed"]] for r in found.by_cell]
    tables = [
        ("By source", ["source", "collection", "added", "removed", "kept"], by_source),
        ("Why", ["", "samples", "reason"], why),
        (
            "Items",
            ["change", "collection", "item", "by", "samples", "reason", "since"],
            items,
        ),
        ("Ground cells", ["cell", "added", "removed"], cells),
    ]
    return [
        (title if len(rows) <= SHOWN else f"{title} ({SHOWN} of {len(rows):,})", columns,
         [[str(value) for value in row] for row in rows[:SHOWN]])
        for title, columns, rows in tables
        if rows
    ]  # fmt: skip


def print_difference(found: Difference | ModelDifference) -> None:
    """A difference in the terminal."""
    kept = f", kept {found.kept:,}" if isinstance(found, Difference) else ""
    out.print(f"{found.headline()}{kept}", highlight=False)
    for title, columns, rows in tables_of(found):
        print_table(title, columns, rows)


def version_markdown(published: Published) -> str:
    """A version and its difference for the Prefect UI."""
    lines = [f"### {published.headline()}", ""]
    for title, columns, rows in tables_of(published.difference) if published.difference else []:
        lines += [f"**{title}**", "", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
        lines += [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text from a catalogue as a table cell that stays one."""
    plain = "".join(c if c.isprintable() and c not in "|<>`[]" else " " for c in text)
    return plain or " "
