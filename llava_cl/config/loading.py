"""Run files: their inheritance, dotted overrides, paths and folders, and every problem in one message.

A run file names a benchmark, a model and a method (each a YAML file of its own, or the same content
inline) and holds the hyper-parameters. `extends: other.yaml` starts from another run file. Every path is
relative to the file in which it is written. A section that names a file replaces the inherited one, and so does a
benchmark with tasks of its own or another method; any other mapping changes only the keys it has. A list replaces.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llava_cl.config.benchmark import AnyTask, BenchmarkConfig, ClassTaskConfig
from llava_cl.config.schema import RunConfig
from llava_cl.config.section import Section, checked
from llava_cl.errors import InputError
from llava_cl.listing import entries, is_image
from llava_cl.parsing import MAX_YAML_BYTES, SURROGATE, near_miss, parse_yaml, read_text, shown
from llava_cl.terminal import printable

_SHIPPED = Path(__file__).resolve().parents[2] / "configs"
_PATHS = ((None, "data_root"), ("model", "path"), ("model", "vision_tower"), ("distributed", "deepspeed"))
_FILE_SECTIONS = ("benchmark", "model", "method")
_WHOLE = {"benchmark": "tasks", "method": "name"}
"""Sections that replace an inherited one as a whole where they have another value under this key."""
_Section = TypeVar("_Section", bound=Section)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path, "give the path of a YAML file", MAX_YAML_BYTES)
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values at the top level.")
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; null removes an inherited section."""
    merged = dict(base)
    for section, key in _WHOLE.items():
        before, now = base.get(section), over.get(section)
        if isinstance(before, Mapping) and isinstance(now, Mapping) and key in now and now[key] != before.get(key):
            del merged[section]
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        elif value is None and isinstance(merged.get(key), Mapping):
            del merged[key]
        else:
            merged[key] = value
    return merged


def _anchor(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the paths of one file's content absolute, relative to the folder of that file."""
    content = dict(content)
    for section, key in _PATHS:
        inside = content if section is None else content.get(section)
        if isinstance(inside, dict) and isinstance(inside.get(key), str):
            inside = {**inside, key: str(_place(folder, inside[key]))}
            content = inside if section is None else {**content, section: inside}
    return content


def _place(folder: Path, path: str) -> Path:
    """A path of a file in `folder`, absolute; one that cannot be is left, and refused where it is used."""
    try:
        return (folder / Path(path).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, the home of nobody, a zero byte
        return folder / path


@contextlib.contextmanager
def _named_by(source: str, key: str) -> Iterator[None]:
    """Adds to what is wrong with a file where it is named."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{problem} ({key} of {source})" for problem in error.problems)) from error


def _resolve(content: dict[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Reads the sections that name a file and makes paths absolute, both relative to `folder`."""
    content = dict(content)
    for section in _FILE_SECTIONS:
        if isinstance(content.get(section), str):
            file = _place(folder, content[section])
            with _named_by(source, section):
                content[section] = _anchor({section: _read_yaml(file)}, file.parent)[section]
    return _anchor(content, folder)


def _load_content(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = _place(Path.cwd(), str(path))
    if path in seen:
        raise InputError(f"{path}: extends itself through {' -> '.join(str(p.name) for p in seen)}.")
    content = _read_yaml(path)
    replacing = [section for section in _FILE_SECTIONS if isinstance(content.get(section), str)]
    content = _resolve(content, path.parent, str(path))
    base = content.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: extends: must be the path of a run file, is {shown(base)}.")
        with _named_by(str(path), "extends"):
            inherited = _load_content(_place(path.parent, base), (*seen, path))
        content = _merge({key: value for key, value in inherited.items() if key not in replacing}, content)
    return content


def load_benchmark(file: Path) -> BenchmarkConfig:
    """Reads a benchmark file.

    Raises:
        InputError: unreadable, broken YAML or wrong content; all problems at once.
    """
    return _validated(BenchmarkConfig, _read_yaml(file), str(file))


def shipped_benchmarks() -> dict[str, Path]:
    """The benchmark files that come with the project, by name."""
    return {file.stem: file for file in sorted((_SHIPPED / "benchmarks").glob("*.yaml"))}


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies `a.b=c` overrides to a nested mapping; values are read as YAML.

    Raises:
        InputError: an override without `=`, or whose value is not YAML.
    """
    result = dict(content)
    replacing = tuple(f"{section}.{key}=" for section, key in _WHOLE.items())
    # These first, so that they do not take back what others set.
    for override in sorted(overrides, key=lambda override: not override.startswith(replacing)):
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override}: write it as key=value, for example training.epochs=2.")
        nested: Any = parse_yaml(value, f"--set {override}") if value else ""
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = _merge(result, nested)
    return result


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run file, applies overrides and validates the whole.

    Args:
        path: the run file.
        overrides: `a.b=c` strings; paths in them are relative to the working directory.

    Raises:
        InputError: an unreadable file, broken YAML, an unknown key or a wrong value; all problems at once.
    """
    path = Path(path)
    content = _load_content(path)
    content.setdefault("name", path.stem)
    return validate_config(content, str(path), overrides)


def validate_config(content: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Applies overrides to a run file's content and validates the whole, naming `source` in every problem.

    Raises:
        InputError: one problem for each wrong key.
    """
    config = _validated(RunConfig, _resolve(apply_overrides(content, overrides), Path.cwd(), source), source)
    benchmark = _with_folders(_with_aliases(config.benchmark, config.data_root), config.data_root)
    return config.model_copy(update={"benchmark": benchmark})


def _with_aliases(benchmark: BenchmarkConfig, root: Path) -> BenchmarkConfig:
    """The benchmark with the paths of those aliased folders that are there, where the folders themselves are not."""

    def actual(path: str) -> str:
        for folder, alias in benchmark.aliases.items():
            if path.startswith(f"{folder}/") and not (root / folder).exists() and (root / alias).exists():
                return alias + path.removeprefix(folder)
        return path

    def renamed(task: AnyTask) -> AnyTask:
        return task.model_copy(update={field: actual(path) for field, path in task.paths().items()})

    return benchmark.with_each(renamed)


def _with_folders(benchmark: BenchmarkConfig, root: Path) -> BenchmarkConfig:
    """The benchmark with the names of class folders, where these are there, in place of their places or number.

    Raises:
        InputError: folders that do not fit what the tasks say of them, all named.
    """
    problems: list[str] = []
    imageless = functools.cache(_imageless)

    def named(task: AnyTask) -> AnyTask:
        if not isinstance(task, ClassTaskConfig) or not (root / (task.train or task.test)).is_dir():
            return task
        place = root / (task.train or task.test)
        found = sorted((entry.name for entry in entries(place) if entry.is_dir()), key=_natural)
        if isinstance(task.classes, int) or not all(isinstance(name, str) for name in task.classes):
            problems.extend(imageless(place))
        wanted = tuple(found) if isinstance(task.classes, int) else task.classes
        if isinstance(task.classes, int) and len(found) != task.classes:
            problems.append(f"{place}: holds {len(found)} class folders, {task.classes} are expected.")
        outside = [name for name in wanted if isinstance(name, int) and not 0 <= name < len(found)]
        if outside:
            problems.append(f"{place}: holds {len(found)} class folders, so there is no number {outside[0]}.")
            return task
        folders = tuple(found[name] if isinstance(name, int) else name for name in wanted)
        strange = sorted(set(task.names) - set(folders))
        if strange:
            close = near_miss(strange[0], folders)
            problems.append(
                f"benchmark task {task.name}, names: {', '.join(strange)} is no folder of its classes.{close}"
            )
        return task.model_copy(update={"classes": folders, "names": {**_names_beside(place), **task.names}})

    resolved = benchmark.with_each(named)
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return resolved


def _imageless(place: Path) -> list[str]:
    """What is wrong with folders that would count as classes, and move the numbers of those that follow."""
    return [
        f"{place}: {printable(folder.name)} "
        + (
            "has a name that is not UTF-8; rename it."
            if SURROGATE.search(folder.name)
            else "holds no image; remove it."
        )
        for folder in entries(place)
        if folder.is_dir()
        and (SURROGATE.search(folder.name) or not any(is_image(entry.name) for entry in entries(folder)))
    ]


def _natural(name: str) -> tuple[int, int, str]:
    """Sorts numbers as numbers, before other names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _names_beside(folder: Path) -> dict[str, str]:
    """What `names.json` beside a folder calls its classes, if it is there."""
    file = folder.parent / "names.json"
    if not file.is_file():
        return {}
    content = _read_yaml(file)
    wrong = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, str))]
    if wrong:
        raise InputError(f"{file}: {wrong[0]!r}: a class folder and its name must both be strings.")
    return content


def _validated(model: type[_Section], content: Mapping[str, Any], source: str) -> _Section:
    return checked(model, content, lambda key: f"{source}: {key or 'the file'}")
