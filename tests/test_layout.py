"""The architecture, read from the sources: imports run one way, in no circle, and only edges know what is outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "pipelines", "models")
# Who may know the environment, and why.
ENVIRONMENT = {
    "pipelines.media.decoder_process": "hands a few named variables on to the decoder's process",
    "pipelines.media.mp4": "sets SVT_LOG, the only switch of what SVT-AV1 prints",
}


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Module name → file and syntax tree."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: (path, ast.parse(path.read_text())) for name, path in zip(names, paths, strict=True)}


def imports(module: str) -> Iterator[str]:
    """What a module imports anywhere in it: at its top, in its functions, for its types only."""
    for node in ast.walk(sources()[module][1]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relative to itself"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in sources() else str(node.module) for name in inner)


def below(package: str) -> list[str]:
    return [name for name in sources() if name.partition(".")[0] == package]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("models", {"pipelines", "jobs", "ray", "s3fs", "fsspec", "av", "pyarrow"}), ("pipelines", {"jobs"})],
)
def test_imports_run_one_way(package: str, forbidden: set[str]) -> None:
    found = {module: {name.partition(".")[0] for name in imports(module)} & forbidden for module in below(package)}
    assert len(found) > 1
    assert {module: names for module, names in found.items() if names} == {}


def test_no_circles() -> None:
    """Modules whose imports are all gone are taken away until none is left, or a circle is."""
    left = {module: {name for name in imports(module) if name in sources()} - {module} for module in sources()}
    while leaves := {module for module, names in left.items() if not names}:
        left = {module: names - leaves for module, names in left.items() if module not in leaves}
    assert left == {}


def test_only_storage_knows_file_systems() -> None:
    heads = {module: {name.partition(".")[0] for name in imports(module)} for module in sources()}
    knowing = {module for module, names in heads.items() if names & {"fsspec", "s3fs", "boto3", "botocore"}}
    assert knowing == {"pipelines.storage"}


def test_the_environment_is_read_in_jobs_only() -> None:
    knowing = {module for module, (_, tree) in sources().items() if _reads_environment(tree)}
    assert knowing - set(below("jobs")) == set(ENVIRONMENT)


def _reads_environment(tree: ast.Module) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return bool(names & {"environ", "environb", "getenv"})


def test_libraries_print_nothing() -> None:
    printing = {
        module
        for module in [*below("pipelines"), *below("models")]
        for node in ast.walk(sources()[module][1])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == set()


def test_every_module_says_what_it_is() -> None:
    assert [module for module, (_, tree) in sources().items() if not ast.get_docstring(tree)] == []
