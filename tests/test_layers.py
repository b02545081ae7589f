"""Imports only look down: every import of the package, read from the source, respects the order of the layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_cl

PACKAGE = Path(llava_cl.__file__).parent
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {"errors", "parsing", "config", "logging", "distributed", "environment", "listing", "stopping", "terminal"}
    ),
    frozenset({"subspace"}),
    frozenset({"store"}),
    frozenset({"models", "data"}),
    frozenset({"methods"}),
    frozenset({"training", "evaluation"}),
    frozenset({"pipeline"}),
    frozenset({"report"}),
    frozenset({"cli"}),
)
"""From the bottom. Parts of one layer do not see each other, but for those of the lowest."""
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def _imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and part of the package of every import, also of those inside functions.

    Args:
        source: the text of a module.
        package: the package that holds the module, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "llava_cl" else [module]
        for name in names:
            root, *rest = name.split(".")
            if root == "llava_cl" and rest:
                yield node.lineno, rest[0]


def _violations(file: Path, source: str) -> list[str]:
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    package = ("llava_cl", *file.relative_to(PACKAGE).parent.parts)
    found = []
    for line, imported in _imports(source, package):
        sideways = part != imported and HEIGHT.get(imported) == HEIGHT[part] != 0
        if imported in HEIGHT and (HEIGHT[imported] > HEIGHT[part] or sideways):
            found.append(f"{file.relative_to(PACKAGE)}:{line} imports {imported}")
    return found


def _modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.stem in HEIGHT]


def test_imports_only_look_down() -> None:
    assert [line for file in _modules() for line in _violations(file, file.read_text())] == []


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in PACKAGE.rglob("*.py")}
    assert parts - {"__init__", "__main__"} <= HEIGHT.keys()


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("subspace/x.py", "from llava_cl.training.adapters import attach"),
        ("models/x.py", "import llava_cl.pipeline.steps"),
        ("models/x.py", "from llava_cl import data"),
        ("data/x.py", "from llava_cl.models import family"),
        ("training/x.py", "from llava_cl.evaluation.generate import predict"),
        ("store/x.py", "def f():\n    from ..methods import Method"),
        ("methods/x.py", "from ..training import adapters"),
        ("report/x.py", "if True:\n    from llava_cl import cli"),
        ("errors.py", "from . import store"),
    ],
)
def test_an_upward_or_sideways_import_is_found(place: str, source: str) -> None:
    assert len(_violations(PACKAGE / place, source)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("training/x.py", "import torch\nfrom llava_cl.models import family\nfrom llava_cl import config, errors"),
        ("training/x.py", "from .adapters import attach\nfrom llava_cl.training import trainer"),
        ("distributed.py", "from llava_cl.errors import RunError"),
        ("cli.py", "from llava_cl import __version__\nfrom llava_cl.report import page"),
    ],
)
def test_downward_imports_are_allowed(place: str, source: str) -> None:
    assert _violations(PACKAGE / place, source) == []
