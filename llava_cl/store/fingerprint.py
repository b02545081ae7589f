"""Fingerprints of what a run depends on: the base model's files, the benchmark's data files, and the code."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_cl.config import ClassTaskConfig, RunConfig
from llava_cl.errors import InputError
from llava_cl.parsing import shown
from llava_cl.store.files import file_hash, read_json
from llava_cl.store.stage_directory import FORMAT

_PACKAGE = Path(__file__).parents[1]
_STARTED = ("pipeline/worker.py", "pipeline/orchestrator.py")
"""What a run begins with: the ranks, and the command that starts them and puts results together."""
_CAPTIONS = "evaluation/captions.py"
_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".bin"}
_MODEL_NAMES = ("merges.txt", "vocab.txt", "*.jinja", "additional_chat_templates/*.jinja")
_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_SAMPLE = 1 << 15
_LISTED = 10
_THREADS = 16
"""Of a network's file system more files than there are cores can be read at a time."""


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


def fingerprint_model(folders: Sequence[Path], run_format: int = FORMAT) -> str:
    """One SHA-256 over the names and hashes of the files in a checkpoint's folders.

    Raises:
        InputError: as `model_files`.
    """
    hashes = [sorted(fingerprint_files(model_files(folder, run_format), folder).items()) for folder in folders]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def model_files(folder: Path, run_format: int = FORMAT) -> set[Path]:
    """What loading a checkpoint can read of its folder, and so its fingerprint covers.

    Settings and tokenizers (`*.json`, `*.model`, `merges.txt`, `vocab.txt`), chat templates (`*.jinja`), weights
    (`*.safetensors`, `*.bin`), and the weights that an index names in folders below. In runs of format 1, what has one
    of the suffixes .json, .model, .safetensors and .bin.

    Raises:
        InputError: an index that is none, or names a file outside the folder.
    """
    found = {file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES and not file.is_dir()}
    if run_format == 1:
        return found
    for index in (file for pattern in _INDICES for file in folder.glob(pattern)):
        # What is missing may be of another layout, or is told on loading.
        found |= {file for file in indexed_files(index) if file.is_file()}
    return found | {file for pattern in _MODEL_NAMES for file in folder.glob(pattern)}


def indexed_files(index: Path) -> list[Path]:
    """The files of weights that an index names.

    Raises:
        InputError: it is no index, names none, or one outside its folder.
    """
    names = read_json(index, "weight_map")["weight_map"]
    named = set(names.values()) if isinstance(names, dict) and names else {None}
    problems = [
        f"{index}: weight_map names {shown(name)}, which is no file below its folder."
        for name in named
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts
    ]
    if problems:
        raise InputError(*problems)
    return sorted(index.parent / str(name) for name in named)


def fingerprint_pictures(pictures: Mapping[str, Path]) -> str:
    """One SHA-256 over the names of pictures, and of each its size and its first and last 32 KiB.

    Raises:
        InputError: pictures that cannot be read; the first ones are named.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        samples = dict(zip(pictures, pool.map(_sampled, pictures.values()), strict=True))
    unread = [
        f"image {pictures[name]}: cannot be read ({error})." for name, error in samples.items() if error[0] != "#"
    ]
    if unread:
        raise InputError(*unread[:_LISTED], *([f"and {len(unread) - _LISTED} more."] if unread[_LISTED:] else []))
    return hashlib.sha256(repr(sorted(samples.items())).encode()).hexdigest()


def _sampled(file: Path) -> str:
    """# and the SHA-256 of a file's size and ends, or why it cannot be read."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_SAMPLE)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(len(content), size - _SAMPLE))
            return "#" + hashlib.sha256(b"%d %s" % (size, content + stream.read())).hexdigest()
    except OSError as error:
        return str(error.strerror)


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
