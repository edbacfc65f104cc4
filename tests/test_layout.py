"""The rooms of the code: imports run down the floors, in no circle. What ruff can tell it tells (pyproject.toml)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "pipelines", "models")
# From the top down. A room imports from floors below its own only; rooms of one floor do not know each other.
FLOORS = (
    {"jobs"},
    {"pages", "sharing"},
    {"evaluation", "features", "search"},
    {"training"},
    {"clips", "extraction"},
    {"datasets"},
    {"media", "tvl1", "models"},
)
# Files beside the rooms, which all may use. They know each other and errors.py, nothing else.
SHARED = {"errors", "formatting", "garbage", "lock", "ray_data", "records", "resume", "scratch", "storage"}


@cache
def sources() -> dict[str, ast.Module]:
    """Module name → syntax tree."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def imports(module: str) -> Iterator[str]:
    """What a module imports anywhere in it: at its top, in its functions, for its types only."""
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in sources() else str(node.module) for name in inner)


def room_of(module: str) -> str:
    """`media` of pipelines.media.decode, `storage` of pipelines.storage, `models` of models.i3d."""
    head, _, rest = module.partition(".")
    return rest.partition(".")[0] if head == "pipelines" else head


def floor_of(room: str) -> int:
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in sources()} - {""}
    assert rooms == set().union(*FLOORS) | SHARED


def test_imports_run_down() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in sources()
        for name in imports(module)
        if name.partition(".")[0] in PACKAGES
        and room_of(name) != room_of(module)
        and room_of(name) not in SHARED
        and floor_of(room_of(name)) <= floor_of(room_of(module))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("models", {"pipelines", "jobs", "ray", "s3fs", "fsspec", "av", "pyarrow"}), ("pipelines", {"jobs"})],
)
def test_packages_do_not_know(package: str, forbidden: set[str]) -> None:
    known = {name.partition(".")[0] for module in sources() for name in imports(module) if module.startswith(package)}
    assert known & forbidden == set()
    assert len(known) > 1


def test_no_circles() -> None:
    """Modules whose imports are all gone are taken away until none is left, or a circle is."""
    left = {module: {name for name in imports(module) if name in sources()} - {module} for module in sources()}
    while leaves := {module for module, names in left.items() if not names}:
        left = {module: names - leaves for module, names in left.items() if module not in leaves}
    assert left == {}
