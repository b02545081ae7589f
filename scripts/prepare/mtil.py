"""Class folders for MTIL's eleven data sets, read by torchvision's loaders.

    python scripts/prepare/mtil.py data/torchvision data
    python scripts/prepare/mtil.py data/torchvision data --only DTD SUN397

ROOT is the folder that torchvision reads (`cifar-100-python`, `dtd`, `SUN397` and so on); OUT is the data root, which
must hold ROOT (or use --copy). Writes OUT/<Name>/{train,test}/<class folder>/: relative links, or PNG where the loader
has only pixels. A class folder is called as the class is in its prompt, with underscores for spaces; a name that holds
other characters that a folder cannot have is in OUT/<Name>/names.json. Start it as often as you like: what is there is
kept, and never overwritten.

Caltech101, EuroSAT and SUN397 have no split of their own: 80 % of a permutation seeded with 42 are for training.
torchvision lists SUN397 in the order of the file system; here its paths are sorted first, so that the split is the same
everywhere. It need not be the authors' split.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from class_folders import Picture, check_places, main_guard, warn_of_counts, write_class_folders

from llava_cl.errors import InputError

Labelled = Sequence[tuple[Picture, int]]
PERMUTATIONS = {
    27_000: [4542, 1781, 1366, 19963, 16858],
    8_677: [8512, 5748, 7753, 4345, 5587],
    108_754: [57128, 82947, 84286, 54173, 36280],
}
"""Beginnings of the permutations that make the random splits."""
CALTECH = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a  crocodile",  # two spaces, as published
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}
EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
_FLOWERS = (
    "pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, "
    "bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, "
    "globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, "
    "pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, "
    "stemless gentian, artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, "
    "alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, "
    "daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, "
    "common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, "
    "orange dahlia, pink-yellow dahlia, cautleya spicata, japanese anemone, black-eyed susan, silverbush, "
    "californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, "
    "water lily, rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, "
    "hibiscus, columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, "
    "ball moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, "
    "trumpet creeper, blackberry lily"
)
FLOWERS = tuple(_FLOWERS.split(", "))
"""In the order of the labels."""


class Loaded(NamedTuple):
    """What a loader lists: the names of the classes, in the order of the labels, and the images of both splits."""

    names: Sequence[str]
    train: Labelled
    test: Labelled


@dataclass(frozen=True)
class DataSet:
    """One data set: its classes, images of train and test, how it is loaded, and classes that are called otherwise."""

    classes: int
    sizes: tuple[int, int]
    load: Callable[[Any, str], Loaded]
    rename: Mapping[str, str] = field(default_factory=dict)


def _by_split(loader: str, splits: tuple[str, str] = ("train", "test"), files: str = "_image_files") -> Any:
    """A data set of files with splits of its own."""

    def load(datasets: Any, root: str) -> Loaded:
        parts = [getattr(datasets, loader)(root, split=split, download=False) for split in splits]
        train, test = (_zipped(getattr(part, files), part._labels) for part in parts)
        return Loaded(parts[0].classes, train, test)

    return load


def _of_pixels(loader: str) -> Any:
    """A data set of arrays."""

    def load(datasets: Any, root: str) -> Loaded:
        parts = [getattr(datasets, loader)(root, train=train, download=False) for train in (True, False)]
        train, test = (
            [(pixels, int(label)) for pixels, label in zip(np.asarray(part.data), part.targets, strict=True)]
            for part in parts
        )
        return Loaded(parts[0].classes, train, test)

    return load


def _flowers(datasets: Any, root: str) -> Loaded:
    """Loaders count the labels from 0 or, older ones, from 1; not all have names."""
    parts = [datasets.Flowers102(root, split=split, download=False) for split in ("train", "test")]
    first = min(parts[0]._labels, default=0)
    train, test = (_zipped(part._image_files, [label - first for label in part._labels]) for part in parts)
    return Loaded(FLOWERS, train, test)


def _cars(datasets: Any, root: str) -> Loaded:
    parts = [datasets.StanfordCars(root, split=split, download=False) for split in ("train", "test")]
    train, test = ([(Path(file), int(label)) for file, label in part._samples] for part in parts)
    return Loaded(parts[0].classes, train, test)


def _caltech(datasets: Any, root: str) -> Loaded:
    found = datasets.Caltech101(root, download=False)
    folder = Path(root) / "caltech101" / "101_ObjectCategories"
    files = [
        folder / found.categories[label] / f"image_{number:04d}.jpg"
        for number, label in zip(found.index, found.y, strict=True)
    ]
    return Loaded(found.categories, *random_split(_zipped(files, found.y)))


def _eurosat(datasets: Any, root: str) -> Loaded:
    found = datasets.EuroSAT(root, download=False)
    return Loaded(found.classes, *random_split([(Path(file), int(label)) for file, label in found.samples]))


def _sun(datasets: Any, root: str) -> Loaded:
    found = datasets.SUN397(root, download=False)
    pairs = _zipped(found._image_files, found._labels)
    return Loaded(found.classes, *random_split(sorted(pairs, key=lambda pair: str(pair[0]))))


DATA_SETS = {
    "Aircraft": DataSet(100, (3334, 3333), _by_split("FGVCAircraft")),
    "Caltech101": DataSet(101, (6941, 1736), _caltech, CALTECH),
    "CIFAR100": DataSet(100, (50_000, 10_000), _of_pixels("CIFAR100")),
    "DTD": DataSet(47, (1880, 1880), _by_split("DTD")),
    "EuroSAT": DataSet(10, (21_600, 5400), _eurosat, EUROSAT),
    "Flowers": DataSet(102, (1020, 6149), _flowers),
    "Food": DataSet(101, (75_750, 25_250), _by_split("Food101")),
    "MNIST": DataSet(10, (60_000, 10_000), _of_pixels("MNIST")),
    "OxfordPet": DataSet(37, (3680, 3669), _by_split("OxfordIIITPet", ("trainval", "test"), "_images")),
    "StanfordCars": DataSet(196, (8144, 8041), _cars),
    "SUN397": DataSet(397, (87_003, 21_751), _sun),
}


def _zipped(files: Sequence[Any], labels: Sequence[int]) -> Labelled:
    return [(Path(file), int(label)) for file, label in zip(files, labels, strict=True)]


def permutation(count: int) -> list[int]:
    """The order from which random splits are cut."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(42)).tolist()


def random_split(pictures: Labelled) -> tuple[Labelled, Labelled]:
    """The first 80 % of the permutation, and the rest."""
    order = permutation(len(pictures))
    count = int(0.8 * len(pictures))
    return [pictures[i] for i in order[:count]], [pictures[i] for i in order[count:]]


def check_permutations() -> None:
    """Compares the permutations with the published ones.

    Raises:
        InputError: this torch draws others.
    """
    for count, beginning in PERMUTATIONS.items():
        drawn = permutation(count)[: len(beginning)]
        if drawn != beginning:
            raise InputError(
                f"torch {torch.__version__}: the permutation of {count} begins with {drawn} in place of {beginning}, "
                "so the random splits would be others; use another version of torch."
            )


def folder_name(name: str) -> str:
    """The folder of a class."""
    return re.sub(r'[/\\:*?"<>|]', "-", name.replace(" ", "_"))


def layout(name: str, loaded: Loaded) -> tuple[dict[str, dict[str, Picture]], dict[str, str]]:
    """Where each image goes, by split, and the names of classes whose folders do not say them.

    Raises:
        InputError: other classes than the data set has, or two images of the same place.
    """
    chosen = DATA_SETS[name]
    classes = [chosen.rename.get(original, original.replace("_", " ")) for original in loaded.names]
    folders = [folder_name(entry) for entry in classes]
    if len(set(folders)) != chosen.classes or len(folders) != chosen.classes:
        raise InputError(
            f"{name}: the loader knows {len(set(folders))} classes, {chosen.classes} are expected; check the download."
        )
    unknown = sorted(set(chosen.rename) - set(loaded.names))
    if unknown:
        raise InputError(f"{name}: the loader knows no class {unknown[0]}; check the download.")
    splits: dict[str, dict[str, Picture]] = {}
    for part, pictures in (("train", loaded.train), ("test", loaded.test)):
        split = splits[part] = {}
        for number, (picture, label) in enumerate(pictures):
            file = picture.name if isinstance(picture, Path) else f"{number:05d}.png"
            if not 0 <= label < len(folders):
                raise InputError(f"{name}: the loader gives the label {label}; there are {len(folders)} classes.")
            key = f"{folders[label]}/{file}"
            if key in split:
                raise InputError(f"{name}: {picture} and {split[key]} would both be {part}/{key}.")
            split[key] = picture
    names = zip(folders, classes, strict=True)
    return splits, {folder: entry for folder, entry in names if folder.replace("_", " ") != entry}


def prepare(root: Path, out: Path, only: Sequence[str], copy: bool) -> None:
    """Writes the class folders of the data sets.

    Raises:
        InputError: what is wrong, of all data sets; those that are right are written.
    """
    root = root.resolve()
    check_places(root, out, copy)
    if out.resolve().is_relative_to(root):
        raise InputError(
            f"{out}: is ROOT or lies in it; move the downloads into a folder below OUT, such as torchvision."
        )
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build that does not fit torch
        raise InputError(
            f"torchvision reads these data sets, and is not usable here ({error}): pip install torchvision scipy."
        ) from error
    check_permutations()
    problems: list[str] = []
    for name in dict.fromkeys(only):
        try:
            _write(name, datasets, root, out, copy)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)


def _write(name: str, datasets: Any, root: Path, out: Path, copy: bool) -> None:
    chosen = DATA_SETS[name]
    try:
        loaded = chosen.load(datasets, str(root))
    except AttributeError as error:
        raise InputError(f"{name}: this version of torchvision does not fit ({error}); use another one.") from error
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name}: torchvision does not load it from {root} ({error}); see docs/vision.md.") from error
    splits, names = layout(name, loaded)
    warn_of_counts(name, splits, chosen.classes, dict(zip(("train", "test"), chosen.sizes, strict=True)))
    write_class_folders(out / name, splits, names=names, copy=copy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder that torchvision's loaders read")
    parser.add_argument("out", type=Path, metavar="OUT", help="the data root")
    parser.add_argument("--only", nargs="+", choices=tuple(DATA_SETS), default=tuple(DATA_SETS), metavar="NAME")
    parser.add_argument("--copy", action="store_true", help="copies in place of links")
    options = parser.parse_args(arguments)
    return main_guard(lambda: prepare(options.root, options.out, options.only, options.copy))


if __name__ == "__main__":
    sys.exit(main())
