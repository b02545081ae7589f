"""The prepare scripts on small invented downloads: layout, links, what is refused, and that the package reads it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import json
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_cl.config import ClassTaskConfig, load_config
from llava_cl.data import load_class_records, load_image

ROOT = Path(__file__).parents[2]
PREPARE = ROOT / "scripts" / "prepare"
RUNS = ROOT / "configs" / "runs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script of the folder as a module."""
    monkeypatch.syspath_prepend(PREPARE)
    return importlib.import_module


@pytest.fixture
def incremental(script: Callable[[str], Any]) -> Callable[..., int]:
    module = script("class_incremental")
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def picture(file: Path, colour: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(file)
    return file


def listing(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def state(folder: Path) -> dict[str, int]:
    return {str(file): file.lstat().st_mtime_ns for file in sorted(folder.rglob("*"))}


def binary(file: Path, labels: list[int]) -> np.ndarray:
    """Writes records of CIFAR-100's binary version; returns the pixels."""
    pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = np.array([[7, label] for label in labels], np.uint8)
    file.write_bytes(np.concatenate([head, pixels.reshape(len(labels), -1)], axis=1).tobytes())
    return pixels.transpose(0, 2, 3, 1)


def test_cifar100_keeps_every_pixel(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "raw", tmp_path / "CIFAR-100"
    train = binary(source / "train.bin", [*range(100), 3])
    binary(source / "test.bin", list(range(100)))
    assert incremental("cifar100", source, out) == 0
    told = capsys.readouterr()
    assert "101 train images, 50000 are expected" in told.err
    assert "classes, 100" not in told.err
    records = load_class_records(out / "train", [str(label) for label in range(100)])
    assert [record.id for record in records if record.label == 3] == ["3/00003.png", "3/00100.png"]
    for index in (3, 100):
        assert np.array_equal(np.asarray(load_image(f"train/3/{index:05d}.png", out)), train[index])
    task = load_config(RUNS / "cifar100_10_splitlora.yaml", [f"data_root={tmp_path}"]).benchmark.tasks[0]
    assert isinstance(task, ClassTaskConfig)
    assert task.folders[:3] == ("82", "36", "20")

    before = state(out)
    assert incremental("cifar100", source, out) == 0
    assert "0 written" in capsys.readouterr().out
    assert state(out) == before

    picture(out / "train" / "3" / "00003.png")
    (out / "val" / "5" / "00005.png").unlink()
    assert incremental("cifar100", source, out) == 2
    assert f"{out}/train/3/00003.png: is there with another content" in capsys.readouterr().err
    assert not (out / "val" / "5" / "00005.png").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cifar-100-binary"), (b"12", "no records"), (bytes([0, 100]) + bytes(3072), "the label 100")],
)
def test_cifar100_refuses_other_files(
    incremental: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    problem: str,
) -> None:
    (tmp_path / "raw").mkdir()
    if content is not None:
        (tmp_path / "raw" / "train.bin").write_bytes(content)
    assert incremental("cifar100", tmp_path / "raw", tmp_path / "out") == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_imagenet_r_by_lists_has_its_classes_by_rank(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "raw" / "imagenet-r", tmp_path / "ImageNet-R"
    classes = [f"n{number:08d}" for number in range(1000, 1400, 2)]
    for name in classes:
        for file in ("art_0.png", "toy_1.png", "toy_2.png"):
            picture(source / name / file)
    (source / "README.txt").touch()
    train = listing(
        tmp_path / "train.txt", [f"{name}/{file}" for name in classes for file in ("art_0.png", "toy_1.png")]
    )
    val = listing(tmp_path / "val.txt", [f"{name}/toy_2.png" for name in reversed(classes)])
    arguments = ("imagenet_r", source, out, "--train-list", train, "--val-list", val)
    assert incremental(*arguments) == 0
    assert "400 train images, 24000 are expected" in capsys.readouterr().err
    link = out / "train" / classes[0] / "art_0.png"
    assert str(link.readlink()) == f"../../../raw/imagenet-r/{classes[0]}/art_0.png"
    assert load_image(f"ImageNet-R/train/{classes[0]}/art_0.png", tmp_path).size == (2, 2)
    assert len(load_class_records(out / "val", classes)) == 200
    config = load_config(RUNS / "imagenet_r_20_splitlora.yaml", [f"data_root={tmp_path}"])
    folders = [task.folders for task in config.benchmark.tasks if isinstance(task, ClassTaskConfig)]
    assert folders[0] == tuple(classes[rank] for rank in (105, 6, 168, 90, 65, 159, 71, 165, 111, 179))
    assert sorted(name for own in folders for name in own) == classes

    before = state(out)
    assert incremental(*arguments) == 0
    assert state(out) == before
    # Another split over the first would have images in both parts.
    assert incremental("imagenet_r", source, out, "--train-list", val, "--val-list", train) == 2
    assert "does not belong to this data" in capsys.readouterr().err
    assert state(out) == before


def test_imagenet_r_without_lists_says_that_the_split_is_its_own(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ["n1", "n2", "n3"]
    for name in classes:
        for number in range(20):
            picture(tmp_path / "raw" / name / f"{number}.png")
    for out in ("one", "two"):
        assert incremental("imagenet_r", tmp_path / "raw", tmp_path / out) == 0
        assert "the authors' lists are not published" in capsys.readouterr().out
    train, val = ({r.id for r in load_class_records(tmp_path / "one" / part, classes)} for part in ("train", "val"))
    assert (len(train), len(val), len(train | val)) == (48, 12, 60)
    assert train == {record.id for record in load_class_records(tmp_path / "two" / "train", classes)}


@pytest.mark.parametrize(
    ("train", "val", "problem"),
    [
        (["n1/0.png", "n2/0.png"], ["n1/0.png", "n2/1.png"], "in the lists of both splits"),
        (["n1/0.png", "n1/0.png"], ["n1/1.png"], "twice"),
        (["../n1/0.png"], ["n1/1.png"], "no path of 2 parts"),
        (["../n1"], ["n1/1.png"], "no path of 2 parts"),
        (["n1/0.png", "n2/0.png"], ["n1/1.png"], "class folder n2 would have no images in val"),
        (["n1/0.png"], ["n1/9.png"], "n1/9.png: this image is missing"),
        (["n1/0.png"], ["n1/notes.txt"], "is no image by its name"),
    ],
)
def test_imagenet_r_refuses_wrong_lists(
    incremental: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    train: list[str],
    val: list[str],
    problem: str,
) -> None:
    for name in ("n1", "n2"):
        for number in range(2):
            picture(tmp_path / "raw" / name / f"{number}.png")
    (tmp_path / "raw" / "n1" / "notes.txt").touch()
    lists = [listing(tmp_path / f"{part}.txt", lines) for part, lines in (("train", train), ("val", val))]
    arguments = ("imagenet_r", tmp_path / "raw", tmp_path / "out", "--train-list", lists[0])
    assert incremental(*arguments, "--val-list", lists[1]) == 2
    assert problem in capsys.readouterr().err
    assert incremental(*arguments) == 2
    assert "give both" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def domainnet(folder: Path) -> tuple[Path, Path]:
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for label, name in ((0, "cake"), (7, "zebra"), (120, "anvil")):
        for domain in ("real", "sketch"):
            for part in lines:
                file = picture(folder / "raw" / domain / name / f"{domain}_{part}.png")
                lines[part].append(f"{file.relative_to(folder / 'raw').as_posix()} {label}")
    return listing(folder / "train.txt", lines["train"]), listing(folder / "val.txt", lines["val"])


def test_domainnet_folders_are_labels_in_three_digits(incremental: Callable[..., int], tmp_path: Path) -> None:
    train, val = domainnet(tmp_path)
    out = tmp_path / "DomainNet"
    assert incremental("domainnet", tmp_path / "raw", out, "--train-list", train, "--val-list", val) == 0
    assert [place.name for place in sorted((out / "val").iterdir())] == ["000", "007", "120"]
    assert str((out / "train" / "120" / "real_train.png").readlink()) == "../../../raw/real/anvil/real_train.png"
    assert [r.id for r in load_class_records(out / "val", ["007"])] == ["007/real_val.png", "007/sketch_val.png"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("real/cake/real_val.png", "no label"),
        ("real/cake/real_val.png 1000", "no label"),
        ("cake/real_val.png 1", "no path of 3 parts"),
        ("sketch/cake/../real_val.png 1", "no path of 3 parts"),
    ],
)
def test_domainnet_refuses_wrong_lines(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    train, val = domainnet(tmp_path)
    val.write_text(f"{val.read_text()}{line}\n")
    assert incremental("domainnet", tmp_path / "raw", tmp_path / "out", "--train-list", train, "--val-list", val) == 2
    assert problem in capsys.readouterr().err


def test_domainnet_refuses_two_images_of_one_name(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = domainnet(tmp_path)
    val.write_text(f"{val.read_text()}sketch/cake/real_val.png 0\n")
    assert incremental("domainnet", tmp_path / "raw", tmp_path / "out", "--train-list", train, "--val-list", val) == 2
    assert "would both be 000/real_val.png" in capsys.readouterr().err


def test_images_outside_of_the_data_root_are_copied_or_refused(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = domainnet(tmp_path / "elsewhere")
    out = tmp_path / "data" / "DomainNet"
    arguments = ("domainnet", tmp_path / "elsewhere" / "raw", out, "--train-list", train, "--val-list", val)
    assert incremental(*arguments) == 2
    assert "links may not leave" in capsys.readouterr().err
    assert not out.exists()
    for _ in range(2):
        assert incremental(*arguments, "--copy") == 0
    assert not (out / "train" / "000" / "real_train.png").is_symlink()
    assert load_image("DomainNet/train/000/real_train.png", tmp_path / "data").size == (2, 2)


def test_an_output_in_the_download_is_refused(
    incremental: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "raw" / "n1" / "0.png")
    assert incremental("imagenet_r", tmp_path / "raw", tmp_path / "raw" / "ImageNet-R", "--copy") == 2
    assert "lies in SOURCE" in capsys.readouterr().err


def test_wrong_arguments_end_with_code_2(tmp_path: Path) -> None:
    script = str(PREPARE / "class_incremental.py")
    command = [sys.executable, script, "cifar100", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/none: is no folder; give the folder of the unpacked download.\n"


EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
EUROSAT += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Listed:
    """A loader of files with splits."""

    def __init__(self, root: str, split: str, download: bool) -> None:
        assert not download
        self.classes = [f"kind_{number}" for number in range(46)] + ["polka-dotted"]
        self._labels = list(range(47))
        self._image_files = [picture(Path(root) / "dtd" / f"{split}{label}.jpg") for label in self._labels]


class Cars:
    def __init__(self, root: str, split: str, download: bool) -> None:
        self.classes = ["Ram C/V Cargo Van Minivan 2012", *(f"Audi {number} 2012" for number in range(195))]
        folder = Path(root) / "stanford_cars"
        files = [folder / f"cars_{split}" / f"{label:05d}.jpg" for label in range(196)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        self._samples = [(str(file), np.uint8(label)) for label, file in enumerate(files)]


class Folders:
    def __init__(self, root: str, download: bool) -> None:
        self.classes = EUROSAT
        self.samples = [
            (str(picture(Path(root) / "eurosat" / name / f"{name}_{number}.png")), label)
            for label, name in enumerate(EUROSAT)
            for number in range(30)
        ]


class Digits:
    def __init__(self, root: str, train: bool, download: bool) -> None:
        self.classes = [f"{number} - {name}" for number, name in enumerate(DIGITS)]
        self.targets = list(range(10)) * (2 if train else 1)
        self.data = np.arange(len(self.targets) * 4, dtype=np.uint8).reshape(-1, 2, 2)


class Missing:
    def __init__(self, root: str, **options: Any) -> None:
        raise RuntimeError("Dataset not found.")


@pytest.fixture
def mtil(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script, with loaders of invented data sets and a root for them in `tmp_path / "data"`."""
    loaders = {"DTD": Listed, "StanfordCars": Cars, "EuroSAT": Folders, "MNIST": Digits, "Food101": Missing}
    for name, content in (("torchvision", {}), ("torchvision.datasets", loaders)):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["torchvision"])["datasets"] = sys.modules["torchvision.datasets"]
    (tmp_path / "data" / "torchvision").mkdir(parents=True)
    return script("mtil")


def test_mtil_writes_folders_that_say_the_prompts(
    mtil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    arguments = [str(data / "torchvision"), str(data), "--only", "DTD", "StanfordCars", "EuroSAT", "MNIST"]
    assert mtil.main(arguments) == 0
    assert "warning: EuroSAT: 240 train images, 21600 are expected" in capsys.readouterr().err

    config = load_config(RUNS / "mtil_order1_keeplora.yaml", [f"data_root={data}"])
    tasks = {task.name: task for task in config.benchmark.tasks if isinstance(task, ClassTaskConfig)}
    prompts = {
        name: [tasks[name].template.format(own) for own in tasks[name].class_names()]
        for name in ("DTD", "StanfordCars", "EuroSAT", "MNIST")
    }
    assert prompts["DTD"][-1] == "a photo of a polka-dotted thing."
    assert prompts["MNIST"] == [f'a photo of the number: "{n} - {name}".' for n, name in enumerate(DIGITS)]
    assert "a photo of the Ram C/V Cargo Van Minivan 2012, a type of car." in prompts["StanfordCars"]
    assert "a centered satellite photo of industrial buildings or commercial buildings." in prompts["EuroSAT"]
    assert json.loads((data / "StanfordCars" / "names.json").read_text()) == {
        "Ram_C-V_Cargo_Van_Minivan_2012": "Ram C/V Cargo Van Minivan 2012"
    }
    assert not (data / "EuroSAT" / "names.json").exists()
    for name in prompts:
        for part in ("train", "test"):
            assert load_class_records(data / name / part, tasks[name].folders)
    link = data / "DTD" / "test" / "kind_3" / "test3.jpg"
    assert str(link.readlink()) == "../../../torchvision/dtd/test3.jpg"
    assert load_image("DTD/test/kind_3/test3.jpg", data).size == (2, 2)
    digit = np.asarray(Image.open(data / "MNIST" / "train" / "2_-_two" / "00012.png"))
    assert digit.tolist() == [[48, 49], [50, 51]]

    before = state(data / "DTD")
    assert mtil.main(arguments) == 0
    assert state(data / "DTD") == before
    (data / "StanfordCars" / "names.json").write_text("{}")
    assert mtil.main(arguments) == 2
    assert "names.json: is there with another content" in capsys.readouterr().err


def test_mtil_cuts_random_splits_from_the_published_permutation(mtil: Any, tmp_path: Path) -> None:
    pictures = [(Path(str(number)), 0) for number in range(8677)]
    train, test = mtil.random_split(pictures)
    assert (len(train), len(test)) == (6941, 1736)
    assert [str(file) for file, _ in train[:5]] == ["8512", "5748", "7753", "4345", "5587"]
    assert {str(file) for file, _ in train}.isdisjoint(str(file) for file, _ in test)


def test_mtil_sorts_the_files_of_sun397(mtil: Any) -> None:
    files = [Path(f"/r/SUN397/a/abbey/sun_{number:02d}.jpg") for number in range(50)]
    shuffled = files.copy()
    random.Random(1).shuffle(shuffled)

    def load(order: list[Path]) -> Any:
        found = types.SimpleNamespace(classes=["abbey"], _image_files=order, _labels=[0] * len(order))
        return mtil._sun(types.SimpleNamespace(SUN397=lambda root, download: found), "/r")

    assert load(shuffled) == load(files)
    assert load(files).train[0] == (files[mtil.permutation(50)[0]], 0)


@pytest.mark.parametrize("first", [0, 1])
def test_mtil_names_flowers_by_label_from_0_or_1(mtil: Any, first: int) -> None:
    found = types.SimpleNamespace(
        _labels=[label + first for label in range(102)],
        _image_files=[f"image_{label:05d}.jpg" for label in range(102)],
    )
    loaded = mtil._flowers(types.SimpleNamespace(Flowers102=lambda root, split, download: found), "/r")
    splits, names = mtil.layout("Flowers", loaded)
    assert list(splits["train"])[:2] == ["pink_primrose/image_00000.jpg", "hard-leaved_pocket_orchid/image_00001.jpg"]
    assert list(splits["test"])[101] == "blackberry_lily/image_00101.jpg"
    assert names == {}


def test_mtil_names_caltech_as_published(mtil: Any) -> None:
    categories = sorted([*mtil.CALTECH, *(f"other_{number}" for number in range(89))])
    labels = list(range(101))
    found = types.SimpleNamespace(categories=categories, index=[1] * 101, y=labels)
    loaded = mtil._caltech(types.SimpleNamespace(Caltech101=lambda root, download: found), "/r")
    splits, names = mtil.layout("Caltech101", loaded)
    folders = {key.split("/")[0] for split in splits.values() for key in split}
    assert {"off-center_face", "head_of_a__crocodile", "snoopy_(cartoon_beagle)", "side_of_a_car", "other_3"} <= folders
    assert names == {}


def test_mtil_wording_is_frozen(mtil: Any) -> None:
    """A prompt that changes makes other scores."""
    wording = {"flowers": ", ".join(mtil.FLOWERS), "caltech": repr(mtil.CALTECH), "eurosat": repr(mtil.EUROSAT)}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in wording.items()} == {
        "flowers": "39195b1cb7c751cc",
        "caltech": "9ee6269b223c99be",
        "eurosat": "5bf384c26331fd96",
    }


def test_mtil_refuses_what_is_wrong_and_goes_on_with_the_rest(
    mtil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    without_files = types.SimpleNamespace(classes=EUROSAT)
    monkeypatch.setattr(sys.modules["torchvision.datasets"], "EuroSAT", lambda root, download: without_files)
    arguments = [str(data / "torchvision"), str(data), "--only", "Food", "EuroSAT", "MNIST"]
    assert mtil.main(arguments) == 2
    told = capsys.readouterr().err
    assert "Food: torchvision does not load it" in told
    assert "(Dataset not found.)" in told
    assert "EuroSAT: this version of torchvision does not fit" in told
    assert (data / "MNIST" / "test" / "0_-_zero").is_dir()
    assert not (data / "Food").exists()


def test_mtil_asserts_classes(mtil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    EUROSAT.append("SeaLakes")
    try:
        assert mtil.main([str(data / "torchvision"), str(data), "--only", "EuroSAT"]) == 2
    finally:
        EUROSAT.pop()
    assert "EuroSAT: the loader knows 11 classes, 10 are expected" in capsys.readouterr().err
    assert not (data / "EuroSAT").exists()


def test_mtil_writes_nothing_where_the_permutation_differs(
    mtil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    monkeypatch.setitem(mtil.PERMUTATIONS, 27_000, [1, 2, 3])
    assert mtil.main([str(data / "torchvision"), str(data), "--only", "MNIST"]) == 2
    assert "the permutation of 27000 begins with [4542, 1781, 1366]" in capsys.readouterr().err
    assert not (data / "MNIST").exists()


def test_mtil_needs_torchvision_and_a_root_below_out(
    mtil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert mtil.main([str(data / "torchvision"), str(data / "torchvision")]) == 2
    assert "move the downloads into a folder below OUT" in capsys.readouterr().err
    assert mtil.main([str(data), str(data / "torchvision")]) == 2
    assert "links may not leave" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert mtil.main([str(data / "torchvision"), str(data)]) == 2
    assert "pip install torchvision scipy" in capsys.readouterr().err
