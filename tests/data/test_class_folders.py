"""Images in class folders: which there are, how they become pixels, and that chance depends on seeds alone."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fake_torchvision
from llava_cl.data import Augmented, ClassDataset, ClassRecord, Plain, collate_images, load_class_records
from llava_cl.data.images import resize_and_crop
from llava_cl.errors import InputError

ROOT = Path(__file__).parents[2]
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(9, 7, number).save(folder / name)


def test_classes_come_in_the_order_given_and_images_by_name(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "b/10.jpg", "b/A.JPEG", "a/x.bmp", "c/unused.png", "b/.hidden.png", "a/y.webp")
    assert load_class_records(tmp_path, ["b", "a"]) == [
        ClassRecord("b/10.jpg", 0),
        ClassRecord("b/2.png", 0),
        ClassRecord("b/A.JPEG", 0),
        ClassRecord("a/x.bmp", 1),
        ClassRecord("a/y.webp", 1),
    ]
    assert [record.label for record in load_class_records(tmp_path, ("a", "b"))] == [0, 0, 1, 1, 1]


def test_all_that_is_wrong_with_the_folders_is_named(tmp_path: Path) -> None:
    write(tmp_path, "good/0.png", "mixed/1.png")
    (tmp_path / "mixed" / "notes.txt").write_text("")
    (tmp_path / "mixed" / "inner").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        load_class_records(tmp_path, ["good", "absent", "mixed", "empty", "hidden", "file"])
    problems = error.value.problems
    assert len(problems) == 5
    for problem, parts in zip(
        problems,
        (
            ("absent", "is no folder"),
            ("mixed", "inner, notes.txt"),
            ("empty", "no images"),
            ("hidden", "no images"),
            ("file", "is no folder"),
        ),
        strict=True,
    ):
        assert problem.startswith(str(tmp_path / parts[0]))
        assert parts[1] in problem


def test_of_very_many_problems_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_class_records(tmp_path, [f"{number:02d}" for number in range(25)])
    assert len(error.value.problems) == 11
    assert str(tmp_path / "09") in error.value.problems[9]
    assert "15 more" in error.value.problems[10]


RESIZED = [
    # width and height, resize, side of the square: width and height after resizing, left and top of the square
    ((37, 23), 16, 16, (25, 16), (4, 0)),
    ((23, 37), 16, 16, (16, 25), (0, 4)),
    ((40, 20), 10, 7, (20, 10), (6, 2)),
    ((16, 16), 16, 16, (16, 16), (0, 0)),
    ((5, 3), 16, 11, (26, 16), (8, 2)),
    ((20, 16), (16, 16), 16, (16, 16), (0, 0)),
    ((31, 17), (24, 20), 16, (20, 24), (2, 4)),
    ((9, 7), (33, 29), 22, (29, 33), (4, 6)),
]
"""By hand: the long side is rounded down, and half pixels at the edges to the even number."""


@pytest.mark.parametrize("resampling", [BILINEAR, BICUBIC])
@pytest.mark.parametrize(("size", "resize", "side", "target", "corner"), RESIZED)
def test_resizing_and_cropping_by_hand(
    size: tuple[int, int],
    resize: int | tuple[int, int],
    side: int,
    target: tuple[int, int],
    corner: tuple[int, int],
    resampling: Image.Resampling,
) -> None:
    image = picture(*size)
    whole = np.asarray(image.resize(target, resampling))
    left, top = corner
    result = np.asarray(resize_and_crop(image, side, resize, resampling))
    assert result.shape == (side, side, 3)
    np.testing.assert_array_equal(result, whole[top : top + side, left : left + side])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_become_rgb_before_they_are_resized(mode: str) -> None:
    image = picture(31, 20).convert(mode)
    expected = resize_and_crop(image.convert("RGB"), 12, 14, BICUBIC)
    assert resize_and_crop(image, 12, 14, BICUBIC).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(resize_and_crop(image, 12, 14, BICUBIC)), np.asarray(expected))


def test_plain_pixels_are_scaled_and_normalised() -> None:
    image, mean, std = picture(20, 16), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    pixels = Plain(8, (10, 12), "bilinear", mean, std)(image, 3)
    assert pixels.dtype == torch.float32
    square = np.asarray(image.resize((12, 10), BILINEAR), np.float64)[1:9, 2:10]
    expected = (square / 255 - mean) / std
    np.testing.assert_allclose(pixels.numpy(), expected.transpose(2, 0, 1), rtol=0, atol=1e-6)
    assert torch.equal(pixels, Plain(8, (10, 12), "bilinear", mean, std)(image, 7))
    assert not torch.equal(pixels, Plain(8, (10, 12), "bicubic", mean, std)(image, 3))


def _mean_and_index(image: Image.Image, index: int) -> torch.Tensor:
    return torch.tensor([np.asarray(image).mean(), float(index)])


def test_the_dataset_gives_the_pixels_and_label_of_each_image(tmp_path: Path) -> None:
    write(tmp_path, "train/a/0.png", "train/a/1.png", "train/b/0.png")
    records = load_class_records(tmp_path / "train", ["b", "a"])
    dataset = ClassDataset(records, tmp_path, "train", _mean_and_index)
    assert len(dataset) == 3
    samples = [dataset[index] for index in range(3)]
    assert [sample["labels"] for sample in samples] == [0, 1, 1]
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    for index, (sample, name) in enumerate(zip(samples, ("b/0", "a/0", "a/1"), strict=True)):
        brightness = np.asarray(Image.open(tmp_path / "train" / f"{name}.png")).mean()
        assert sample["pixel_values"].tolist() == pytest.approx([brightness, index])


def test_a_sample_that_fills_up_a_batch_is_the_first_image_without_a_label(tmp_path: Path) -> None:
    write(tmp_path, "train/a/0.png", "train/b/0.png")
    records = load_class_records(tmp_path / "train", ["a", "b"])
    dataset = ClassDataset(records, tmp_path, "train", _mean_and_index)
    filler = dataset[-1]
    assert (filler["labels"], filler["index"]) == (-100, -1)
    assert torch.equal(filler["pixel_values"], dataset[0]["pixel_values"])
    batch = collate_images([dataset[1], filler])
    assert batch["pixel_values"].shape == (2, 2)
    assert batch["labels"].tolist() == [1, -100]
    assert batch["index"].tolist() == [1, -1]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train/a/0.png")
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    records = load_class_records(tmp_path / "train", ["a"])
    dataset = ClassDataset(records, tmp_path, "train", _mean_and_index)
    with pytest.raises(InputError, match=r"a/1\.png"):
        dataset[1]


def test_links_may_point_to_other_places_of_the_data_but_not_out_of_it(tmp_path: Path) -> None:
    write(tmp_path, "data/all/0.png", "elsewhere/1.png")
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").symlink_to(tmp_path / "data" / "all" / "0.png")
    (folder / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    records = load_class_records(tmp_path / "data" / "train", ["a"])
    dataset = ClassDataset(records, tmp_path / "data", "train", _mean_and_index)
    assert dataset[0]["labels"] == 0
    with pytest.raises(InputError, match="leaves the image folder"):
        dataset[1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is made of a torchvision that is stood for."""
    return fake_torchvision.install(monkeypatch)


def _augmented(seed: int = 1, policy: str = "imagenet") -> Augmented:
    return Augmented(policy, 8, "bicubic", (0.5,) * 3, (0.5,) * 3, seed)


def test_augmenting_is_torchvisions(made: list[tuple[Any, ...]]) -> None:
    _augmented(policy="cifar10")
    assert made == [
        ("augment", fake_torchvision.Policy.CIFAR10, fake_torchvision.Mode.BILINEAR),
        ("crop", 8, fake_torchvision.Mode.BICUBIC),
    ]


def test_the_same_seed_epoch_and_index_give_the_same_pixels(made: list[tuple[Any, ...]]) -> None:
    image, first, second = picture(30, 20), _augmented(), _augmented()
    pixels = first(image, 4)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    torch.rand(17)
    first(image, 5)
    assert torch.equal(first(image, 4), pixels)
    assert torch.equal(second(image, 4), pixels)


def test_another_epoch_index_or_seed_gives_others(made: list[tuple[Any, ...]]) -> None:
    image, augmented = picture(30, 20), _augmented()
    results = [augmented(image, 4), augmented(image, 5), _augmented(seed=2)(image, 4)]
    augmented.epoch = 1
    results.append(augmented(image, 4))
    assert not any(torch.equal(one, other) for i, one in enumerate(results) for other in results[:i])
    augmented.epoch = 0
    assert torch.equal(augmented(image, 4), results[0])


def test_augmenting_leaves_the_programs_random_numbers_alone(made: list[tuple[Any, ...]]) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    _augmented()(picture(30, 20), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmenting_leaves_a_gpus_random_numbers_alone(
    made: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws from them."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    _augmented()(picture(30, 20), 4)
    assert seeded == []


def test_without_torchvision_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"images\.augment: .*torchvision.*llava_cl\[(\w+)\]") as error:
        _augmented()
    extra = str(error.value).partition("[")[2].partition("]")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any("torchvision" in requirement for requirement in extras.get(extra, []))
