"""The structure of the code: which room may import which, and no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: The floors. Each may import itself and the floors below it.
FLOORS = ("data_catalog", "geofm", "flows")
#: The rooms of geofm, in order: a room may import only rooms that stand before it in this list.
ROOMS = (
    "config", "formats", "runtime", "remote", "stac", "raster", "chips", "embeddings", "dedup",
    "pool", "selection", "shards", "pretraining", "evaluation", "forecasting", "reporting",
    "planet",
)  # fmt: skip
#: Modules of geofm that stand in no room, and may be imported by all of them.
COMMON = ("stages", "types")
#: Libraries that a floor must not import.
FORBIDDEN = {
    "data_catalog": {"torch", "timm", "rasterio", "prefect", "faiss", "lightning_fabric"},
    "geofm": {"prefect", "prefect_dask", "sqlalchemy", "alembic", "typer"},
    "flows": {"torch", "timm", "rasterio", "faiss", "sqlalchemy"},
}
#: Most modules in one folder, without ``__init__.py``.
MOST_MODULES = 18


def name_of(path: Path) -> str:
    """Dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(p): p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """Return the project's module that holds an imported name."""
    if name in MODULES:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in MODULES else None


#: What each module imports of the project.
IMPORTS = {
    module: {found for name in imports_of(path) if (found := module_of(name))} - {module}
    for module, path in MODULES.items()
}


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_import_only_lower_floors(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    wrong = []
    for module, path in MODULES.items():
        # the planet's own command line is a tool of the planet
        if not module.startswith(floor) or module == "geofm.planet.__main__":
            continue
        tops = {name.split(".")[0] for name in imports_of(path)}
        wrong += [f"{module} -> {top}" for top in tops & (set(FLOORS) - set(allowed))]
        wrong += [f"{module} -> {top}" for top in tops & FORBIDDEN[floor]]
    assert not wrong


def room_of(module: str) -> str:
    """Return the room of a module of geofm."""
    return (*module.split("."), "")[1]


def test_rooms_import_only_rooms_before_them() -> None:
    folders = {p.parent.name for p in (ROOT / "geofm").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    wrong = []
    for module, imported in IMPORTS.items():
        if module.startswith("geofm.") and room_of(module) in ROOMS:
            above = set(ROOMS[ROOMS.index(room_of(module)) + 1 :])
            wrong += [f"{module} -> {other}" for other in imported if room_of(other) in above]
    assert not wrong


def test_common_modules_import_no_room() -> None:
    for name in COMMON:
        assert not {other for other in IMPORTS[f"geofm.{name}"] if room_of(other) in ROOMS}


def test_the_planet_is_imported_by_flows_alone() -> None:
    users = {m for m, imported in IMPORTS.items() if any("geofm.planet" in i for i in imported)}
    assert users
    assert not [m for m in users if not m.startswith(("geofm.planet", "flows."))]


def test_no_module_takes_part_in_a_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(IMPORTS):
        visit(name, ())
    assert done == set(MODULES)


def test_no_folder_has_too_many_modules() -> None:
    folders: dict[str, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(ROOT).as_posix()
            folders[folder] = folders.get(folder, 0) + 1
    assert {folder: n for folder, n in folders.items() if n > MOST_MODULES} == {}


def test_only_the_boundary_catches_everything() -> None:
    broad = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in ("", "Exception", "BaseException"):
                    broad.append(f"{path.relative_to(ROOT).as_posix()}:{caught}")
    # the run record notes any failure and raises it again; the command line is the boundary
    assert broad == ["data_catalog/catalogue.py:BaseException", "flows/cli/main.py:Exception"]


def test_constraints_name_no_index_and_hash_everything() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
    assert len(pins) > 100
    assert text.count("--hash=sha256:") >= len(pins)
