"""Commands of the auditor: what is there, where it came from, and the proof."""

from __future__ import annotations

import random
import secrets
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.hashing import digest_of
from data_catalog.provenance.costs import lineage_costs
from data_catalog.provenance.cross_check import check_rows
from data_catalog.provenance.findings import Findings
from data_catalog.provenance.lineage import (
    Node,
    UnknownSample,
    ancestor,
    ancestry,
    licence_union,
    trace_sample,
    walk,
    weights_read,
)
from data_catalog.provenance.lineage import why as why_chip
from data_catalog.provenance.past import last_sample_in, why_left
from data_catalog.provenance.verify import (
    check_artifact,
    check_chain,
    recorded_manifest,
    sealed_ancestor,
    sealed_input,
    sealed_manifest,
)
from data_catalog.storage.reach import OutOfReach
from flows.cli.console import out, print_json, print_table, progress_bars
from flows.cli.options import Catalog, Json, Ref, Store
from flows.settings import Place, open_place
from flows.versions import difference_between, print_difference

if TYPE_CHECKING:  # rasterio loads only when something is cut
    from geofm.chips.recut import Recut

SampleRef = Annotated[
    str, typer.Argument(metavar="REF[/SAMPLE]", help="An artifact, or one sample of a dataset.")
]
Deep = Annotated[
    bool, typer.Option("--deep", help="Follow the chain to everything it was made from.")
]
RecutSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="S",
        help="Which samples --recut takes. Default: at random; the number is printed.",
    ),
]
RecutCount = Annotated[
    int,
    typer.Option(
        "--recut",
        min=0,
        metavar="N",
        help="Cut N samples again from the source; compare their pixels with the chip table and "
        "the shards.",
    ),
]


def list_(store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """Artifacts in the store, newest first, with the names they are published under."""
    place = open_place(store, catalog, write=False)
    named: dict[str, list[str]] = {}
    for name in place.catalogue.names():
        named.setdefault(name.digest, []).append(f"{name.name}@{name.version}")
    rows, here = place.catalogue.artifacts(), place.store.digests()
    if json_:
        found = [
            {"digest": r.digest, "kind": r.kind, "names": named.get(r.digest, []),
             "in_store": r.digest in here}
            for r in rows
        ]  # fmt: skip
        print_json({"artifacts": found})
        return
    print_table(
        "Artifacts", ["digest", "kind", "made", "rows", "names"],
        [[r.digest[:12], r.kind, f"{r.created_at:%Y-%m-%d %H:%M}",
          str(r.manifest["counts"].get("rows_out", "")),
          ", ".join(named.get(r.digest, [])) + ("" if r.digest in here else " (not in this store)")]
         for r in rows],
    )  # fmt: skip


def runs(store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """Executions of stages, newest first: running, done, failed, or lost (killed)."""
    rows = open_place(store, catalog, write=False).catalogue.runs()[::-1]
    if json_:
        columns = ("id", "stage", "status", "started_at", "finished_at", "seconds", "host", "pid",
                   "artifact", "error")  # fmt: skip
        print_json({"runs": [{name: getattr(row, name) for name in columns} for row in rows]})
        return
    print_table(
        "Runs", ["started", "stage", "status", "seconds", "process", "result"],
        [[f"{row.started_at:%Y-%m-%d %H:%M:%S}", row.stage, row.status,
          "" if row.seconds is None else f"{row.seconds:.1f}", f"{row.pid} on {row.host}",
          (row.artifact or "")[:12] or (row.error or "").partition("\n")[0]] for row in rows],
    )  # fmt: skip


def show(ref: Ref, store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """An artifact's manifest, and what it cost with all it was made from.

    The cost is that of the runs that really made each artifact, all of their sessions; it is in
    this catalogue, not in the artifact.
    """
    from geofm.runtime.cost import as_json, cost_table, remarks

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
    size = sum(f["size"] for f in files) / 2**20
    out.print(f"{len(files)} files, {size:.1f} MiB in {artifact.url}", highlight=False)
    table = cost_table(costs)
    print_table("Cost, with all it was made from", [*table.head], [[*row] for row in table.rows])
    for remark in remarks(costs):
        out.print(remark, highlight=False)


def path(ref: Ref, store: Store = "", catalog: Catalog = "") -> None:
    """An artifact's folder, for scripts."""
    print(open_place(store, catalog, write=False).catalogue.resolve(ref).url)


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The earlier version, or one REF.")],
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="The later version. [default: OLD is the later]")
    ] = "",
    store: Store = "", catalog: Catalog = "", json_: Json = False,
) -> None:  # fmt: skip
    """What changed, and why. OLD [NEW]: datasets or models; with one REF, since its predecessor."""
    found = difference_between(open_place(store, catalog, write=False).catalogue, old, new)
    if json_:
        print_json(asdict(found))
        return
    print_difference(found)


def trace(
    ref: SampleRef,
    store: Store = "", catalog: Catalog = "", json_: Json = False,
) -> None:  # fmt: skip
    """Lineage: an artifact up to its sources, or one sample up to asset, licence and window."""
    catalogue = open_place(store, catalog, write=False).catalogue
    name, _, sample = ref.partition("/")
    artifact = catalogue.resolve(name)
    if sample:
        found = trace_sample(catalogue, ancestor(catalogue, artifact, "dataset"), sample)
        print_json(found) if json_ else out.print_json(data=found)
        return
    tree = ancestry(catalogue, artifact)
    if json_:
        print_json(_lineage(tree, "", set()))
        return
    _print_lineage(tree)


def why(
    chip: Annotated[str, typer.Argument(metavar="CHIP", help="Id of a candidate chip.")],
    within: Annotated[str, typer.Option("--in", metavar="REF", help="A dataset, model or report.")],
    picture: Annotated[
        str, typer.Option(metavar="FILE", help="Where the PNG goes. Default: in the store, or "
                     "in the temporary folder where the store can't be written.")
    ] = "",
    store: Store = "", catalog: Catalog = "", json_: Json = False,
) -> None:  # fmt: skip
    """Why a candidate chip was kept or dropped: rule, scores, the chip that stayed instead."""
    place = open_place(store, catalog, write=False)
    artifact = place.catalogue.resolve(within)
    try:
        found = why_chip(place.catalogue, artifact, chip)
    except UnknownSample:
        found = why_left(place.catalogue, artifact, chip) or {}
        if not found:
            raise
        artifact = place.catalogue.get(found["artifact"])  # its pixels are in the earlier version
    else:
        if found.get("decision") != "keep":
            found["was_in"] = last_sample_in(place.catalogue, artifact, chip)
    found["picture"] = _draw_pair(place, artifact, found, picture)
    if json_:
        print_json(found)
        return
    out.print(f"{found.get('decision', found.get('status'))}: {found.get('rule', found['reason'])}")
    if found.get("was_in"):
        out.print(found["reason"] if found["decision"] == "left" else f"was in {found['was_in']}",
                  highlight=False)  # fmt: skip
    out.print_json(data=found)
    if found["picture"]:
        other = beside(found)[1]
        out.print(f"the chip{f' and {other}' if other else ''}: {found['picture']}")


def beside(found: dict[str, Any]) -> tuple[str, str]:
    """Return the id of the chip to draw beside a dropped one, and what it is; empty if none."""
    if witness := str(found.get("witness_id") or found.get("witness") or ""):
        return witness, "its witness"
    if nearest := str(found.get("nearest_id") or ""):
        return nearest, "the most similar kept chip"
    return "", ""


def _draw_pair(place: Place, artifact: Artifact, found: dict[str, Any], target: str) -> str | None:
    """Draw the chip and the one beside it; returns the path of the PNG, None without pixels."""
    from geofm.reporting.pictures import side_by_side

    chips = ancestor(place.catalogue, artifact, "chips")
    png = side_by_side(chips, [chip for chip in (found["chip_id"], beside(found)[0]) if chip])
    if png is None:
        return None
    if target:
        try:
            Path(target).write_bytes(png)
        except OSError as error:
            raise UsageError(f"--picture {target} can't be written ({error.strerror})") from error
        return target
    name = f"{digest_of(found['chip_id'])[:16]}.png"
    try:
        file = place.store.scratch(f"why-{found['artifact'][:16]}") / name
        file.write_bytes(png)
    except OSError:  # a store that can only be read
        file = Path(tempfile.mkdtemp(prefix="geofm-why-")) / name
        file.write_bytes(png)
    return str(file)


def licences(ref: Ref, store: Store = "", catalog: Catalog = "", json_: Json = False) -> None:
    """The licences in an artifact's lineage, with what brings each."""
    catalogue = open_place(store, catalog, write=False).catalogue
    rows = licence_union(catalogue, catalogue.resolve(ref))
    if json_:
        print_json({"licences": rows})
        return
    columns = ["licence", "collection", "samples", "items", "brought by"]
    print_table(
        "Licences", columns,
        [[row["licence"], row["collection"], str(row["samples"] or ""), str(row["items"] or ""),
          f"dataset {row['dataset'][:12]}" if row["dataset"] else f"weights {row['weights']}"]
         for row in rows],
    )  # fmt: skip


def verify(
    ref: Ref,
    deep: Deep = False,
    recut: RecutCount = 0,
    seed: RecutSeed = None,
    store: Store = "", catalog: Catalog = "", json_: Json = False,
) -> None:  # fmt: skip
    """Re-hash an artifact; name the shard and sample where a bit differs.

    Exit code 4: something is damaged or contradicts the manifests. 3: something could not be read,
    and no damage was found in the rest.
    """
    catalogue = open_place(store, catalog, write=False).catalogue
    artifact = catalogue.resolve(ref)
    seed = secrets.randbelow(2**32) if seed is None else seed
    with progress_bars():
        found = _findings(catalogue, artifact, deep)
        again = _recut_if_whole(artifact, recut, seed, found) if recut else []
    same = [one for one in again if one.is_same]
    away = [one for one in again if one.problem and not one.changed]
    problems = found.problems + [text for one in again for text in one.differences()]
    skipped = ["no sample was cut again, because of this"] if recut and not again else []
    if json_:
        checked = {"recut": len(again), "recut_identical": len(same), "recut_away": len(away),
                   "recut_seed": seed if recut else None}  # fmt: skip
        print_json(
            {"digest": artifact.digest, "problems": problems, "unread": found.unread, **checked}
        )
    if problems:
        raise CheckError(
            "\n  ".join([f"{len(problems)} problems in {ref}:", *problems, *found.unread, *skipped])
        )
    if found.unread:
        raise OutOfReach(
            "\n  ".join(
                [
                    f"{ref} could not be read in full, so it is not verified:",
                    *found.unread,
                    *skipped,
                ]
            )
        )
    if away:
        raise RunError(
            f"all bytes are as sealed, but {len(away)} of {len(again)} samples could not be cut "
            f"again ({away[0].problem}); try again when the source answers"
        )
    if not json_:
        files = len(artifact.manifest.files)
        more = f", {len(again)} samples (--seed {seed}) cut again with identical pixels"
        out.print(
            f"{ref}: {files} files as sealed{', whole chain' if deep else ''}"
            f"{more if again else ''}"
        )


def _findings(catalogue: Catalogue, artifact: Artifact, deep: bool) -> Findings:
    """Check an artifact, with its chain if ``deep``; of a dataset also the index and shards."""
    recorded = recorded_manifest(catalogue, artifact.digest)
    found = check_chain(catalogue, artifact) if deep else check_artifact(artifact, recorded)
    sealed = sealed_manifest(artifact, recorded)
    if sealed is None:
        return found
    if not deep:
        found.add(check_rows(catalogue, artifact, sealed))
    if sealed.kind == "dataset":
        from geofm.shards.check import check_index, verify_shards

        try:
            if found.problems:
                found.add(Findings(verify_shards(artifact, sealed)))
            else:
                found.add(Findings(check_index(artifact)))
        except OutOfReach as error:
            found.unread.append(str(error))
    return found


def _recut_if_whole(artifact: Artifact, count: int, seed: int, found: Findings) -> list[Recut]:
    """Cut samples again if nothing is damaged or unread; add to ``found`` what prevents it."""
    from geofm.shards.check import check_index

    if found.problems or found.unread:
        return []
    try:
        made = [sealed_ancestor(artifact, "dataset")]
        for role in ("chips", "items"):
            made.append(sealed_input(made[-1], made[-1].manifest, role))
            found.add(check_artifact(made[-1], suffix=".parquet"))
        if made[0].digest != artifact.digest:
            found.add(check_artifact(made[0], suffix=".parquet"))
        if not (found.problems or found.unread):
            found.add(Findings(check_index(made[0])))
        if not (found.problems or found.unread):
            return _recut(made[0], made[1], made[2], count, seed)
    except (CheckError, OutOfReach) as error:
        found.add_error(error)
    return []


def _recut(
    dataset: Artifact, chips: Artifact, items: Artifact, count: int, seed: int
) -> list[Recut]:
    """Cut ``count`` samples of a dataset again, and compare them with its shards as well."""
    from geofm.chips.recut import recut
    from geofm.planet.catalog.serving import serving_source
    from geofm.shards.check import packed_pixels

    ids = sorted(dataset.table("index.parquet", ["chip_id"])["chip_id"])
    if not ids:
        raise UsageError(f"{dataset.digest[:12]} holds no samples to cut again")
    chosen = random.Random(seed).sample(ids, min(count, len(ids)))
    packed = packed_pixels(dataset, chosen)
    stac = items.manifest.settings.get("stac")
    if not isinstance(stac, str):
        raise CheckError(f"the manifest of items {items.digest[:12]} names no settings.stac")
    with serving_source(stac):
        return [replace(one, packed=packed[one.chip_id]) for one in recut(chips, items, chosen)]


def _lineage(node: Node, role: str, seen: set[str]) -> dict[str, Any]:
    """A lineage as JSON: each artifact in full once, then by its digest alone."""
    artifact = node.artifact
    found = {"kind": artifact.kind, "digest": artifact.digest, "role": role}
    if artifact.digest in seen:
        return found
    seen.add(artifact.digest)
    manifest = artifact.manifest
    parents = [_lineage(parent, name, seen) for name, parent in node.parents.items()]
    return {
        **found, "settings": manifest.settings, "counts": manifest.counts,
        "weights": weights_read(artifact), "parents": parents,
    }  # fmt: skip


def _print_lineage(tree: Node) -> None:
    """A lineage as a table, each artifact once."""
    rows = []
    for node in walk(tree):
        manifest = node.artifact.manifest
        rows.append(
            [manifest.kind, node.artifact.digest[:12], f"{manifest.counts.get('rows_out', 0):,}",
             ", ".join(_origins(node))]
        )  # fmt: skip
    title = f"Lineage of {tree.artifact.kind} {tree.artifact.digest}"
    print_table(title, ["kind", "digest", "rows", "made from"], rows)


def _origins(node: Node) -> list[str]:
    """What an artifact was made from: inputs by role, the API of items, published weights."""
    found = [f"{role} {parent.artifact.digest[:12]}" for role, parent in node.parents.items()]
    if node.artifact.kind == "items":
        found.append(str(node.artifact.manifest.settings.get("stac", "")))
    for weights in weights_read(node.artifact):
        if not weights["model"]:
            terms = weights["licence"] or "licence not stated"
            found.append(f"{weights['role']} {weights['network']} ({terms})")
    return found


def add_to(app: typer.Typer) -> None:
    """Add the auditor's commands."""
    app.command(name="list")(list_)
    for command in (runs, show, path, diff, trace, why, licences, verify):
        app.command()(command)
