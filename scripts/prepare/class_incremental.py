"""Class folders for the class-incremental streams: CIFAR-100, ImageNet-R, and 200 classes of DomainNet.

    python scripts/prepare/class_incremental.py cifar100 data/downloads/cifar-100-binary data/CIFAR-100
    python scripts/prepare/class_incremental.py imagenet_r data/downloads/imagenet-r data/ImageNet-R
    python scripts/prepare/class_incremental.py domainnet data/downloads/domainnet data/DomainNet \\
        --train-list train.txt --val-list val.txt

Writes OUT/train and OUT/val with a folder of images for each class: PNG for CIFAR-100 (from its binary version), else
relative links into SOURCE, which must lie in the data root, the folder that holds OUT (or use --copy). Start it as
often as you like: what is there is kept, and never overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from class_folders import Picture, check_places, main_guard, warn_of_counts, write_class_folders

from llava_cl.errors import InputError
from llava_cl.listing import entries

EXPECTED = {"cifar100": (100, 50_000, 10_000), "imagenet_r": (200, 24_000, 6_000), "domainnet": (200, 47_532, 20_450)}
"""Classes, and images of train and val."""
PARTS = ("train", "val")
SEED = 0
"""Of the split of ImageNet-R without lists."""
_SIDE = 32
_RECORD = 2 + 3 * _SIDE * _SIDE
_FINE_CLASSES = 100

Lists = tuple[Path | None, Path | None]


def cifar100(source: Path) -> dict[str, dict[str, Picture]]:
    """CIFAR-100 from `train.bin` and `test.bin`, as `<fine label>/<number in the file>.png`."""
    return {"train": _records(source / "train.bin"), "val": _records(source / "test.bin")}


def _records(file: Path) -> dict[str, Picture]:
    try:
        content = np.frombuffer(file.read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give the folder of the binary version, cifar-100-binary."
        ) from error
    if not content.size or content.size % _RECORD:
        raise InputError(f"{file}: {content.size} bytes are no records of {_RECORD} bytes; download it again.")
    records = content.reshape(-1, _RECORD)
    fine = records[:, 1]  # after the coarse label
    if fine.max() >= _FINE_CLASSES:
        raise InputError(f"{file}: holds the label {fine.max()}; this is not CIFAR-100's binary version.")
    pixels = records[:, 2:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return {f"{label}/{n:05d}.png": image for n, (label, image) in enumerate(zip(fine, pixels, strict=True))}


def imagenet_r(source: Path, lists: Lists) -> dict[str, dict[str, Picture]]:
    """ImageNet-R as downloaded, split by two lists of `<wnid>/<file>`, or at random."""
    if any(lists):
        return {
            part: {path: source / path for path in _paths(file, _lines(file), depth=2)}
            for part, file in zip(PARTS, _both(lists), strict=True)
        }
    found = sorted(
        f"{folder.name}/{file.name}" for folder in entries(source) if folder.is_dir() for file in entries(folder)
    )
    if not found:
        raise InputError(f"{source}: holds no folders of images; give the folder of ImageNet-R's wnid folders.")
    order = np.random.Generator(np.random.PCG64(SEED)).permutation(len(found))
    count = int(0.8 * len(found))
    print(
        f"ImageNet-R: the authors' lists are not published; this is a random split of our own, {count} to "
        f"{len(found) - count}, seed {SEED}."
    )
    chosen = {"train": order[:count], "val": order[count:]}
    return {part: {found[i]: source / found[i] for i in sorted(indices)} for part, indices in chosen.items()}


def domainnet(source: Path, lists: Lists) -> dict[str, dict[str, Picture]]:
    """DomainNet by two lists of `<domain>/<class>/<file> <label>`; folders are the label in three digits."""
    splits: dict[str, dict[str, Picture]] = {}
    for part, file in zip(PARTS, _both(lists), strict=True):
        split: dict[str, Picture] = {}
        pairs = [line.rpartition(" ")[::2] for line in _lines(file)]
        wrong = [label for _, label in pairs if not (label.isdecimal() and int(label) < 1000)]
        if wrong:
            raise InputError(f"{file}: {wrong[0]!r} is no label; a line is '<domain>/<class>/<file> <label>'.")
        paths = _paths(file, [path.strip() for path, _ in pairs], depth=3)
        for path, (_, label) in zip(paths, pairs, strict=True):
            key = f"{int(label):03d}/{PurePosixPath(path).name}"
            if key in split:
                raise InputError(f"{file}: {path} and {split[key]} would both be {key}; rename one of them.")
            split[key] = source / path
        splits[part] = split
    return splits


def _both(lists: Lists) -> tuple[Path, Path]:
    train, val = lists
    if train is None or val is None:
        raise InputError("--train-list and --val-list: give both.")
    return train, val


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a text file with one image a line.") from error
    return [line for line in lines if line]


def _paths(file: Path, paths: list[str], depth: int) -> list[str]:
    """The paths of a list, checked to be different, relative, and of so many parts."""
    for path in paths:
        parts = path.split("/")
        if len(parts) != depth or any(part in ("", ".", "..") for part in parts):
            raise InputError(f"{file}: {path!r} is no path of {depth} parts below SOURCE.")
    double = [path for path, times in Counter(paths).items() if times > 1]
    if double:
        raise InputError(f"{file}: lists {double[0]} twice.")
    return paths


def _distinct(splits: dict[str, dict[str, Picture]]) -> None:
    """Refuses an image that is in both splits."""
    common = sorted(map(str, set(splits["train"].values()) & set(splits["val"].values())))
    if common:
        raise InputError(f"{common[0]}: is in the lists of both splits, as {len(common)} images are.")


def prepare(options: argparse.Namespace) -> None:
    """Writes the class folders of one data set."""
    source, out = options.source.resolve(), options.out
    pixels = options.dataset == "cifar100"
    check_places(source, out.resolve().parent, copy=pixels or options.copy)
    if out.resolve() == source or out.resolve().is_relative_to(source):
        raise InputError(f"{out}: lies in SOURCE; give a folder beside it.")
    if pixels:
        splits = cifar100(source)
    else:
        split = {"imagenet_r": imagenet_r, "domainnet": domainnet}[options.dataset]
        splits = split(source, (options.train_list, options.val_list))
        _distinct(splits)
    classes, *sizes = EXPECTED[options.dataset]
    warn_of_counts(options.dataset, splits, classes, dict(zip(PARTS, sizes, strict=True)))
    write_class_folders(out, splits, copy=not pixels and options.copy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True)
    for name in EXPECTED:
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, metavar="SOURCE", help="folder of the unpacked download")
        command.add_argument("out", type=Path, metavar="OUT", help="folder of the data set, in the data root")
        if name != "cifar100":
            needed = name == "domainnet"
            command.add_argument("--train-list", type=Path, required=needed, help="one image a line")
            command.add_argument("--val-list", type=Path, required=needed, help="one image a line")
            command.add_argument("--copy", action="store_true", help="copies in place of links")
    options = parser.parse_args(arguments)
    return main_guard(lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
