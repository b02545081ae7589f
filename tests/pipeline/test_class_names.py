"""Which folders are classes, what they are called, and that a model or a scorer can tell them apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_clip
import tiny_vit
from llava_cl.config import ClassTaskConfig, RunConfig, validate_config
from llava_cl.data import load_class_records
from llava_cl.errors import InputError
from llava_cl.models.clip import Clip
from llava_cl.pipeline.samples import samples_of
from llava_cl.pipeline.task_data import fingerprint_data

LEFT = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "lost+found", "$RECYCLE.BIN", "#recycle", ".Trash-0")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    tiny_clip.run_content(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of data and models that a test may change."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def configured(folder: Path, classes: Any, maker: Any = tiny_vit, **task: Any) -> RunConfig:
    content = maker.run_content(folder)
    content["benchmark"]["tasks"] = [{**content["benchmark"]["tasks"][0], "classes": classes, **task}]
    return validate_config(content, "run.yaml")


def folders(config: RunConfig) -> tuple[str, ...]:
    task = config.benchmark.tasks[0]
    assert isinstance(task, ClassTaskConfig)
    return task.folders


def problems(call: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        call()
    return error.value.problems


def add_class(folder: Path, name: str) -> None:
    for split in ("train", "val"):
        shutil.copytree(folder / "data" / split / "red", folder / "data" / split / name)


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("holds", ["0.png", ""])
def test_what_file_systems_leave_is_no_class(name: str, holds: str, folder: Path) -> None:
    left = folder / "data" / "train" / name
    left.mkdir()
    if holds:
        shutil.copyfile(folder / "data" / "train" / "red" / "0.png", left / holds)
    assert folders(configured(folder, 6)) == tuple(sorted(tiny_vit.COLOURS))
    assert folders(configured(folder, [0, 3])) == ("black", "red")


@pytest.mark.parametrize("holds", ["", "notes.txt", "inner/0.png", ".hidden.png", "Thumbs.db"])
@pytest.mark.parametrize("classes", [7, [0, 3]])
def test_a_folder_without_images_among_counted_classes_is_told(holds: str, classes: Any, folder: Path) -> None:
    place = folder / "data" / "train" / "aaa"
    place.mkdir()
    if holds:
        (place / holds).parent.mkdir(exist_ok=True)
        (place / holds).write_text("")
    assert problems(lambda: configured(folder, classes)) == (
        f"{folder / 'data' / 'train'}: aaa holds no image; remove it.",
    )
    assert folders(configured(folder, ["red", "blue"])) == ("red", "blue")


def test_files_that_systems_leave_are_no_images(folder: Path) -> None:
    place = folder / "data" / "train"
    before = load_class_records(place, ["red"])
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (place / "red" / name).write_text("")
    (place / "red" / "@eaDir").mkdir()
    assert load_class_records(place, ["red"]) == before


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "JPEG", "png", "tif", "tiff", "webp"])
def test_every_listed_format_is_an_image_by_its_suffix(suffix: str, folder: Path) -> None:
    (folder / "data" / "train" / "red" / f"x.{suffix}").write_bytes(b"")
    assert f"red/x.{suffix}" in [record.id for record in load_class_records(folder / "data" / "train", ["red"])]


def test_links_that_lead_nowhere_are_told_before_anything_is_hashed(folder: Path) -> None:
    place = folder / "data" / "train" / "red"
    (place / "dangling.png").symlink_to(folder / "none.png")
    (place / "loop.png").symlink_to(place / "loop.png")
    (place / "folder.png").mkdir()
    (place / "good.png").symlink_to(place / "0.png")
    config = configured(folder, ["red", "blue"])
    for call in (lambda: fingerprint_data(config), lambda: load_class_records(place.parent, ["red", "blue"])):
        (said,) = problems(call)
        assert said.startswith(f"{place}: dangling.png, folder.png, loop.png is no file that can be read, or a link")
    (folder / "data" / "train" / "blue").rename(folder / "blue")
    (folder / "data" / "train" / "blue").symlink_to(folder / "data" / "train" / "blue")
    assert any("blue: is no folder" in problem for problem in problems(lambda: fingerprint_data(config)))


def test_names_that_are_not_utf_8(folder: Path) -> None:
    place = folder / "data" / "train"
    shutil.copyfile(place / "red" / "0.png", os.fsencode(place) + b"/red/caf\xe9.png")
    config = configured(folder, ["red", "blue"])
    assert problems(lambda: fingerprint_data(config)) == (
        f"{place / 'red'}: caf\\udce9.png has a name that is not UTF-8; rename it.",
    )
    shutil.copytree(place / "blue", place / os.fsdecode(b"caf\xe9"))
    assert problems(lambda: configured(folder, 7)) == (f"{place}: caf\\udce9 has a name that is not UTF-8; rename it.",)


def test_a_class_whose_folder_is_written_in_other_capitals(folder: Path) -> None:
    assert problems(lambda: load_class_records(folder / "data" / "train", ["Red"])) == (
        f"{folder / 'data/train/Red'}: is no folder, but should hold the images of a class. Did you mean 'red'?",
    )


@pytest.mark.parametrize(
    "template",
    [
        "",
        "a photo",
        "{} {x}",
        "{} {}",
        "{ {}",
        "{} }",
        "{0}",
        "{!r}",
        "{:>9}",
        "{}{",
        "{{}}",
        "{x}",
        "{} {{}}",
        "{.real}",
    ],
)
def test_a_template_holds_one_place_and_no_other_brace(template: str, folder: Path) -> None:
    (said,) = problems(lambda: configured(folder, ["red", "blue"], template=template))
    assert "template" in said and "must stand in it once" in said


def test_names_may_hold_braces(folder: Path) -> None:
    names = {"red": "{0} {} a", "blue": "{x}"}
    config = configured(folder, ["red", "blue"], tiny_clip, names=names, template="photo of {}.")
    seen: list[str] = []

    def tokenizer(text: str) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [1, 3]}  # the second ends a text of the tiny model

    family = Clip(config.model)
    family._tokenized(config.benchmark.tasks[0], tokenizer)  # type: ignore[arg-type]
    assert seen == ["photo of {0} {} a.", "photo of {x}."]


@pytest.mark.parametrize("other", ["light__red", "Light_Red", "light red", " light_red", "LIGHT RED"])
def test_two_classes_that_a_reading_model_calls_alike_are_refused(other: str, folder: Path) -> None:
    add_class(folder, "light_red")
    add_class(folder, other)
    (said,) = problems(lambda: samples_of(configured(folder, ["blue", "light_red", other], tiny_clip)))
    assert f"classes T1/light_red and T1/{other} have one name" in said


def test_names_that_are_given_count_as_those_of_folders(folder: Path) -> None:
    named = {"names": {"red": "Blue "}}
    (said,) = problems(lambda: samples_of(configured(folder, ["blue", "red"], tiny_clip, **named)))
    assert "classes T1/blue and T1/red have one name" in said
    samples_of(configured(folder, ["blue", "red"], **named))  # a ViT reads no names


def test_the_scorer_tells_no_capitals_apart_whatever_the_model(folder: Path) -> None:
    add_class(folder, "Red")
    (said,) = problems(lambda: samples_of(configured(folder, ["blue", "red", "Red"])))
    assert "classes T1/red and T1/Red have one name" in said
    add_class(folder, "light_red")
    add_class(folder, "light red")
    samples_of(configured(folder, ["light_red", "light red"]))


@pytest.mark.parametrize("maker", [tiny_vit, tiny_clip])
def test_one_name_in_two_tasks_is_refused_where_the_choice_is_among_both(maker: Any, folder: Path) -> None:
    content = maker.run_content(folder)
    first, second = content["benchmark"]["tasks"][:2]
    content["benchmark"]["tasks"] = [{**first, "classes": ["red", "blue"]}, {**second, "classes": ["green", "red"]}]
    content["benchmark"]["evaluate"] = "seen"
    (said,) = problems(lambda: samples_of(validate_config(content, "run.yaml")))
    assert "classes T1/red and T2/red have one name" in said
    if maker is tiny_clip:
        content["benchmark"]["evaluate"] = "all"
        samples_of(validate_config(content, "run.yaml"))
