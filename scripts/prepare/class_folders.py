"""Writes images into class folders: planned in full, compared with what is there, and only then written.

Nothing that is there is ever changed. Files that are there and as they should be are kept, so that a script that was
stopped goes on when it is started again.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_cl.data.class_folders import load_class_records
from llava_cl.errors import InputError, LlavaClError, RunError
from llava_cl.listing import entries, is_image

Picture = Path | np.ndarray
"""An image file, or the pixels `[height, width]` or `[height, width, 3]` uint8."""
Split = Mapping[str, Picture]
""""<class folder>/<file>" -> its image."""
_LISTED = 10
_EVERY = 1000
_NAMES = "names.json"


def main_guard(run: Callable[[], None]) -> int:
    """Runs a script, prints what is wrong as messages, and returns the exit code."""
    try:
        run()
    except LlavaClError as error:
        for problem in str(error).splitlines():
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    return 0


def check_places(source: Path, data_root: Path, copy: bool) -> None:
    """Links may not leave the data root, where the package would refuse them.

    Raises:
        InputError: the source is no folder, or is outside of the data root and its files would be linked.
    """
    if not source.is_dir():
        raise InputError(f"{source}: is no folder; give the folder of the unpacked download.")
    if not copy and not source.resolve().is_relative_to(data_root.resolve()):
        raise InputError(
            f"{source}: is outside of the data root {data_root}, which links may not leave; move it below the data "
            "root, or write copies with --copy."
        )


def write_class_folders(
    out: Path, splits: Mapping[str, Split], *, names: Mapping[str, str] | None = None, copy: bool = False
) -> None:
    """Writes `<out>/<split>/<class folder>/<file>` as relative links, or as PNG where there are only pixels.

    Args:
        out: the folder of the data set.
        splits: the images of each split.
        names: what those classes are called whose folders' names do not say it; goes into `names.json`.
        copy: copies files in place of linking them.

    Raises:
        InputError: a class without images in a split, images that are missing, or another content in `out`.
    """
    out = out.resolve()
    problems = [*_incomplete(out, splits), *_unplanned(out, splits)]
    missing: list[tuple[Path, Picture]] = []
    for file, picture in _planned(out, splits):
        if isinstance(picture, Path) and not picture.is_file():
            problems.append(f"{picture}: this image is missing; complete the download.")
        elif not (file.is_symlink() or file.exists()):
            missing.append((file, picture))
        elif not _same(file, picture, copy):
            problems.append(f"{file}: is there with another content, and is not overwritten.")
    names_file, text = out / _NAMES, json.dumps(dict(names or {}), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if names_file.exists() and (not names or names_file.read_text(encoding="utf-8") != text):
        problems.append(f"{names_file}: is there with another content, and is not overwritten.")
    if problems:
        hidden = len(problems) - _LISTED
        more = [f"{out}: and {hidden} more problems."] if hidden > 0 else []
        afresh = " To start afresh, remove it or give another folder." if out.exists() else ""
        raise InputError(*problems[:_LISTED], *more, f"{out}: nothing was written.{afresh}")
    try:
        for done, (file, picture) in enumerate(missing, start=1):
            _write(file, picture, copy)
            if done % _EVERY == 0 or done == len(missing):
                print(f"\r{out.name}: {done} of {len(missing)} images written", end="", file=sys.stderr, flush=True)
        if missing:
            print(file=sys.stderr)
        if names and not names_file.exists():
            out.mkdir(parents=True, exist_ok=True)
            names_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{error.filename or out}: cannot be written ({error.strerror}); then start again.") from error
    _report(out, splits, len(missing))


def warn_of_counts(name: str, splits: Mapping[str, Split], classes: int, sizes: Mapping[str, int]) -> None:
    """Tells where the numbers of classes or images are not the published ones."""
    found = len({folder for split in splits.values() for folder in _folders(split)})
    told = [("classes", found, classes), *((f"{part} images", len(splits[part]), size) for part, size in sizes.items())]
    for what, number, expected in told:
        if number != expected:
            print(f"warning: {name}: {number} {what}, {expected} are expected.", file=sys.stderr)


def _folders(split: Split) -> set[str]:
    return {key.split("/")[0] for key in split}


def _planned(out: Path, splits: Mapping[str, Split]) -> Iterator[tuple[Path, Picture]]:
    for part, split in splits.items():
        for key, picture in split.items():
            yield out / part / key, picture


def _incomplete(out: Path, splits: Mapping[str, Split]) -> list[str]:
    """Classes that a split lacks, and files that the package would not read."""
    folders = {part: _folders(split) for part, split in splits.items()}
    classes = sorted(set().union(*folders.values()))
    problems = [
        f"{out}: class folder {name} would have no images in {part}; check the download and the lists."
        for part, own in folders.items()
        for name in classes
        if name not in own
    ]
    strange = [key for split in splits.values() for key in split if not is_image(key)]
    return problems + [f"{key}: is no image by its name; take it out of the download or the list." for key in strange]


def _unplanned(out: Path, splits: Mapping[str, Split]) -> list[str]:
    """What is in the splits' folders and does not belong there, such as images of an earlier, other split."""
    found: list[Path] = []
    for part, split in splits.items():
        folders = _folders(split)
        for place in _entries(out / part):
            if not place.is_dir() or place.name not in folders:
                found.append(place)
            else:
                found += (file for file in _entries(place) if f"{place.name}/{file.name}" not in split)
    return [f"{place}: is there and does not belong to this data." for place in found]


def _entries(folder: Path) -> list[Path]:
    return entries(folder) if folder.is_dir() else []


def _same(file: Path, picture: Picture, copy: bool) -> bool:
    if isinstance(picture, Path) and not copy:
        return file.is_symlink() and str(file.readlink()) == _link(file, picture)
    if file.is_symlink() or not file.is_file():
        return False
    if isinstance(picture, Path):
        return filecmp.cmp(file, picture, shallow=False)
    try:
        with Image.open(file) as opened:
            return np.array_equal(np.asarray(opened), picture)
    except (UnidentifiedImageError, OSError, SyntaxError):
        return False


def _link(file: Path, picture: Path) -> str:
    return os.path.relpath(picture, file.parent)


def _write(file: Path, picture: Picture, copy: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Path) and not copy:
        file.symlink_to(_link(file, picture))
        return
    # Under another name first, so that no half file stays behind under its own.
    part = file.with_name(f".{file.name}.part")
    if isinstance(picture, Path):
        shutil.copyfile(picture, part)
    else:
        Image.fromarray(picture).save(part, format="PNG")
    part.replace(file)


def _report(out: Path, splits: Mapping[str, Split], written: int) -> None:
    counts = []
    for part, split in splits.items():
        folders = sorted(_folders(split))
        counts.append(f"{part} {len(load_class_records(out / part, folders))} images in {len(folders)} classes")
    print(f"{out}: {', '.join(counts)}; {written} written, the others were there.")
