"""``geofm sources``: list the source profiles, show one, or check a file of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_catalog.errors import CheckError, UsageError
from flows.cli.console import out, print_json, print_table
from flows.cli.options import Json

if TYPE_CHECKING:
    from data_catalog.sources import Source

Name = Annotated[str, typer.Argument(metavar="[NAME]", help="Show this profile in full, as YAML.")]
Check = Annotated[
    str, typer.Option("--check", metavar="FILE", help="Check a YAML file of profiles.")
]
Item = Annotated[
    str,
    typer.Option(
        "--item",
        metavar="ITEM.json",
        help="With --check: read this STAC item by the profile that fits it, and print the result.",
    ),
]


def sources(name: Name = "", check: Check = "", item: Item = "", json_: Json = False) -> None:
    """List the source profiles: bands, cloud layer, licence and access of each STAC source.

    Profiles of your own come first: set GEOFM_SOURCES to a YAML file, or to a folder of such files
    (docs/sources.md). With `--check`, exit code 2 means a bad file, and 4 an item that does not
    fit its profile.

    Example: `geofm sources --check my-source.yaml --item item.json`
    """
    from data_catalog.sources import load_sources, source_named

    if item and not check:
        raise UsageError("--item needs --check FILE, the file with the profile to read it by")
    if check:
        _check(Path(check), item, json_)
    elif name:
        _show(source_named(name), json_)
    else:
        _list(load_sources(), json_)


def _list(profiles: tuple[Source, ...] | list[Source], json_: bool) -> None:
    if json_:
        print_json({"sources": [source.model_dump(mode="json") for source in profiles]})
        return
    print_table(
        "Source profiles; the first one that fits an item is used",
        ["name", "api", "collections", "licence", "cloud layer", "signing", "reader pays"],
        [[s.name, "\n".join(s.api), "\n".join(s.collections), s.licence,
          s.cloud.asset if s.cloud else "", _signing(s), "yes" if s.requester_pays else ""]
         for s in profiles],
    )  # fmt: skip


def _signing(source: Source) -> str:
    return {"always": "always", "refused": "when refused"}[source.sign_when] if source.sign else ""


def _show(source: Source, json_: bool) -> None:
    import yaml

    if json_:
        print_json(source.model_dump(mode="json"))
        return
    # the output is a file that can be changed and named in GEOFM_SOURCES
    content = source.model_dump(mode="json", exclude_defaults=True)
    print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), end="")


def _check(path: Path, item: str, json_: bool) -> None:
    from data_catalog.sources import read_sources

    profiles = read_sources(path)
    if not item:
        if json_:
            _list(profiles, json_)
        else:
            names = ", ".join(source.name for source in profiles)
            out.print(f"{path}: {len(profiles)} good profiles ({names})", highlight=False)
        return
    from geofm.stac.profile_check import check_profile, profile_for_item

    content = _read_item(Path(item))
    report = check_profile(content, profile_for_item(content, profiles))
    if json_:
        print_json(report)
    elif report["bands"]:
        _print_report(report)
    if report["problems"]:
        raise CheckError(
            "\n  ".join([f"the profile {report['profile']} does not fit:", *report["problems"]])
        )


def _read_item(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--item: {path} can't be read as JSON ({error}); check the file"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"--item: {path} is not a STAC item: it must be a JSON object")
    return content


def _print_report(report: dict[str, Any]) -> None:
    rows = [
        [
            band["name"],
            f"{band['asset']}#{band['index']}",
            _number(band["scale"], "0.0001 (16 bit)"),
            _number(band["offset"], "0"),
            _number(band["nodata"], "the file's"),
        ]
        for band in report["bands"]
    ]
    columns = ["band", "asset#index", "scale", "offset", "nodata"]
    print_table(f"{report['item']} by the profile {report['profile']}", columns, rows)
    cloud, access = report["cloud"], report["access"]
    facts = {
        "licence": report["licence"],
        "cloud": f"{cloud['asset']}, {cloud['codes']} {cloud['cloud']}" if cloud else "no layer",
        **{name: value or "—" for name, value in report["identity"].items()},
        "access": ", ".join(f"{name} {value}" for name, value in access.items() if value),
    }
    print_table("", ["field", "value"], [[name, str(value)] for name, value in facts.items()])
    for note in report["notes"]:
        out.print(f"note: {note}", markup=False, highlight=False)


def _number(value: float | None, absent: str) -> str:
    return absent if value is None else f"{value:g}"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sources)
