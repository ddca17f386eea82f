"""The work of ``geofm list``, ``runs``, ``show`` and ``path``."""

from __future__ import annotations

from data_catalog.provenance.costs import lineage_costs
from flows.cli.console import out, print_json, print_table
from flows.settings import open_place
from geofm.runtime.cost import as_json, cost_table, remarks

#: Columns of the table of runs that ``geofm runs --json`` prints.
RUN_COLUMNS = (
    "id", "stage", "status", "started_at", "finished_at", "seconds", "host", "pid", "artifact",
    "error",
)  # fmt: skip


def print_artifacts(store: str, catalog: str, json_: bool) -> None:
    """Print the artifacts that the catalogue knows, newest first."""
    place = open_place(store, catalog, write=False)
    names: dict[str, list[str]] = {}
    for name in place.catalogue.names():
        names.setdefault(name.digest, []).append(f"{name.name}@{name.version}")
    artifacts, stored = place.catalogue.artifacts(), place.store.digests()
    if json_:
        listed = [
            {
                "digest": row.digest,
                "kind": row.kind,
                "names": names.get(row.digest, []),
                "in_store": row.digest in stored,
            }
            for row in artifacts
        ]
        print_json({"artifacts": listed})
        return
    rows = []
    for row in artifacts:
        absent = "" if row.digest in stored else " (not in this store)"
        rows.append(
            [
                row.digest[:12],
                row.kind,
                f"{row.created_at:%Y-%m-%d %H:%M}",
                str(row.manifest["counts"].get("rows_out", "")),
                ", ".join(names.get(row.digest, [])) + absent,
            ]
        )
    print_table("Artifacts", ["digest", "kind", "made", "rows", "names"], rows)


def print_runs(store: str, catalog: str, json_: bool) -> None:
    """Print the runs of stages, newest first."""
    runs = open_place(store, catalog, write=False).catalogue.runs()[::-1]
    if json_:
        print_json({"runs": [{name: getattr(run, name) for name in RUN_COLUMNS} for run in runs]})
        return
    rows = []
    for run in runs:
        seconds = "" if run.seconds is None else f"{run.seconds:.1f}"
        result = (run.artifact or "")[:12] or (run.error or "").partition("\n")[0]
        started = f"{run.started_at:%Y-%m-%d %H:%M:%S}"
        rows.append([started, run.stage, run.status, seconds, f"{run.pid} on {run.host}", result])
    print_table("Runs", ["started", "stage", "status", "seconds", "process", "result"], rows)


def print_artifact(ref: str, store: str, catalog: str, json_: bool) -> None:
    """Print an artifact's manifest and the cost of its lineage."""
    catalogue = open_place(store, catalog, write=False).catalogue
    artifact = catalogue.resolve(ref)
    manifest = artifact.manifest.model_dump(mode="json")
    costs = lineage_costs(catalogue, [artifact.digest])
    if json_:
        print_json({"digest": artifact.digest, **manifest, "cost": as_json(costs)})
        return
    files = manifest.pop("files")
    out.print(f"[bold]{manifest['kind']}[/] {artifact.digest}")
    out.print_json(data=manifest)
    size = sum(file["size"] for file in files) / 2**20
    out.print(f"{len(files)} files, {size:.1f} MiB in {artifact.url}", highlight=False)
    table = cost_table(costs)
    rows = [[*row] for row in table.rows]
    print_table("Cost, with everything it was made from", [*table.head], rows)
    for remark in remarks(costs):
        out.print(remark, highlight=False)


def print_path(ref: str, store: str, catalog: str) -> None:
    """Print the folder or address of an artifact."""
    print(open_place(store, catalog, write=False).catalogue.resolve(ref).url)
