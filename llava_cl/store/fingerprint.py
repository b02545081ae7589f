"""Fingerprints of what a run depends on: the base model's files, the benchmark's data files, and the code."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llava_cl.config import ClassTaskConfig, RunConfig
from llava_cl.errors import InputError
from llava_cl.store.files import file_hash

_PACKAGE = Path(__file__).parents[1]
_STARTED = ("pipeline/worker.py", "pipeline/orchestrator.py")
"""What a run begins with: the ranks, and the command that starts them and puts results together."""
_CAPTIONS = "evaluation/captions.py"
_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".bin"}


def fingerprint_files(files: Iterable[Path], root: Path) -> dict[str, str]:
    """SHA-256 of each file, keyed by its path relative to `root`.

    Raises:
        InputError: files that do not exist, all named.
    """
    files = sorted(files)
    missing = [f"{file}: does not exist." for file in files if not file.is_file()]
    if missing:
        raise InputError(*missing)
    return {str(file.relative_to(root)): file_hash(file) for file in files}


def fingerprint_model(folders: Sequence[Path]) -> str:
    """One SHA-256 over the names and hashes of the files in a checkpoint's folders."""
    hashes = [
        sorted(fingerprint_files((f for f in folder.iterdir() if f.suffix in _MODEL_SUFFIXES), folder).items())
        for folder in folders
    ]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def fingerprint_code(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each source file of this package that a run's results may come from, by its path in the package.

    That is what the ranks and their command import, at the top of files. Imports inside functions are choices: of
    those the files are taken that the configuration names, its method, its family and its kind of tasks, each with what
    it imports; a method or family without a file of its name counts with its whole folder. The caption metrics count
    where a task has captions. What only shows (`report/`, `cli.py`) is imported by none of them.
    """
    classes = isinstance(config.benchmark.tasks[0], ClassTaskConfig)
    chosen = [f"pipeline/{'image_classes' if classes else 'conversations'}.py"]
    for folder, name in (("methods", config.method.name), ("models", config.model.family)):
        file = f"{folder}/{name}.py"
        all_of = (str(other.relative_to(_PACKAGE)) for other in (_PACKAGE / folder).glob("*.py"))
        chosen += [file] if (_PACKAGE / file).is_file() else all_of
    unused = set() if any(task.scorer.startswith("caption") for task in config.benchmark.evaluated) else {_CAPTIONS}
    found: set[str] = set()
    waiting = {*_STARTED, *chosen}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {*_imported(_PACKAGE / name), *(str(above / "__init__.py") for above in Path(name).parents)}
        waiting -= found | unused
    return fingerprint_files((_PACKAGE / name for name in found), _PACKAGE)


def changed_code(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that are used now and were others then; one that is used no more was imported by a file that changed."""
    return sorted(name for name in now if then.get(name) != now[name])


def _imported(file: Path) -> Iterator[str]:
    """The modules of this package that a file imports outside functions, as paths in the package."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):  # it is being edited, so its own hash tells that it has changed
        return
    for node in body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            package, *parts = name.split(".")
            place = Path(*parts)
            if package == _PACKAGE.name:
                there = (str(place / "__init__.py"), f"{place}.py")
                yield from (module for module in there if (_PACKAGE / module).is_file())
