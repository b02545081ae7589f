"""Fingerprints change with the content and the names of files, and with nothing else."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import llava_cl
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.methods import known_methods
from llava_cl.models.contract import _families
from llava_cl.store.fingerprint import (
    changed_code,
    fingerprint_code,
    fingerprint_files,
    fingerprint_model,
    fingerprint_pictures,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"weights 1")
    (folder / "model-2.safetensors").write_bytes(b"weights 2")
    return folder


def test_files_are_hashed_under_their_relative_names(tmp_path: Path) -> None:
    (tmp_path / "Task").mkdir()
    (tmp_path / "Task" / "train.json").write_bytes(b"[]")
    (tmp_path / "test.json").write_bytes(b"[1]")
    hashes = fingerprint_files([tmp_path / "test.json", tmp_path / "Task" / "train.json"], tmp_path)
    assert hashes == {
        "Task/train.json": hashlib.sha256(b"[]").hexdigest(),
        "test.json": hashlib.sha256(b"[1]").hexdigest(),
    }


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        fingerprint_files([tmp_path / "b", tmp_path / "a"], tmp_path)
    assert error.value.problems == (f"{tmp_path / 'a'}: does not exist.", f"{tmp_path / 'b'}: does not exist.")


def test_a_model_is_the_same_in_another_place(checkpoint: Path, tmp_path: Path) -> None:
    before = fingerprint_model([checkpoint])
    (checkpoint / "README.md").write_text("not part of the model")
    moved = shutil.move(checkpoint, tmp_path / "elsewhere")
    assert fingerprint_model([Path(moved)]) == before


@pytest.mark.parametrize("change", ["content", "name", "swap", "more", "less"])
def test_every_change_of_a_model_shows(checkpoint: Path, change: str) -> None:
    before = fingerprint_model([checkpoint])
    first, second = checkpoint / "model-1.safetensors", checkpoint / "model-2.safetensors"
    match change:
        case "content":
            second.write_bytes(b"weights 3")
        case "name":
            second.rename(checkpoint / "model-3.safetensors")
        case "swap":
            first.rename(checkpoint / "third")
            second.rename(first)
            (checkpoint / "third").rename(second)
        case "more":
            (checkpoint / "tokenizer.model").write_bytes(b"")
        case "less":
            second.unlink()
    assert fingerprint_model([checkpoint]) != before


READ = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/short.jinja",
    "pytorch_model.bin",
    "shards/deep/model-3.safetensors",
    "old/weights-1.bin",
]


@pytest.mark.parametrize("name", READ)
def test_every_file_that_loading_reads_is_part_of_a_model(checkpoint: Path, name: str) -> None:
    for index, weights in (("model.safetensors", "shards/deep/model-3.safetensors"), ("x.bin", "old/weights-1.bin")):
        (checkpoint / f"{index}.index.json").write_text(json.dumps({"weight_map": {"a": weights, "b": "gone.bin"}}))
    before = fingerprint_model([checkpoint])
    file = checkpoint / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"1")
    with_it = fingerprint_model([checkpoint])
    file.write_bytes(b"2")
    assert len({before, with_it, fingerprint_model([checkpoint])}) == 3


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "../w.safetensors"}, "'../w.safetensors', which is no file below"),
        ({"a": "shards/../../w.safetensors"}, "'shards/../../w.safetensors'"),
        ({"a": "/etc/passwd"}, "'/etc/passwd'"),
        ({"a": 3}, "names 3"),
        (["model-1.safetensors"], "names None"),
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(checkpoint: Path, weight_map: object, named: str) -> None:
    (checkpoint.parent / "w.safetensors").write_bytes(b"elsewhere")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=re.escape(named)):
        fingerprint_model([checkpoint])


def test_a_checkpoint_of_links_is_one_of_files(checkpoint: Path, tmp_path: Path) -> None:
    """As in the cache of a hub, whose folders hold links to files elsewhere."""
    before = fingerprint_model([checkpoint])
    links = tmp_path / "links"
    links.mkdir()
    for file in checkpoint.iterdir():
        (links / file.name).symlink_to(file)
    assert fingerprint_model([links]) == before
    (links / "config.json").unlink()
    (links / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"config\.json: does not exist"):
        fingerprint_model([links])


def test_the_rule_of_format_1_is_kept_for_its_runs(checkpoint: Path) -> None:
    names = ("config.json", "model-1.safetensors", "model-2.safetensors")
    hashes = [[(name, hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()) for name in names]]
    (checkpoint / "merges.txt").write_text("a b")
    assert fingerprint_model([checkpoint], 1) == hashlib.sha256(repr(hashes).encode()).hexdigest()
    assert fingerprint_model([checkpoint], 1) != fingerprint_model([checkpoint])


def test_a_changed_picture_shows(tmp_path: Path) -> None:
    pictures = {name: tmp_path / name for name in ("small", "large", "empty")}
    content = {"small": bytes(70), "large": bytes(200_000), "empty": b""}

    def fingerprint(**changed: bytes) -> str:
        for name, own in {**content, **changed}.items():
            pictures[name].write_bytes(own)
        return fingerprint_pictures(pictures)

    whole = fingerprint()
    flipped = {place: bytes(place) + b"1" + bytes(199_999 - place) for place in (0, 32_767, 100_000, 167_232, 199_999)}
    others = [fingerprint(large=flipped[place]) for place in (0, 32_767, 167_232, 199_999)]
    others += [fingerprint(small=bytes(place) + b"1" + bytes(69 - place)) for place in (0, 35, 69)]
    others += [fingerprint(large=bytes(200_001)), fingerprint(empty=b"1")]
    assert len({whole, *others}) == 10
    assert fingerprint(large=flipped[100_000]) == whole, "the middle of a large picture is not read"
    assert fingerprint_pictures(dict(reversed(pictures.items()))) == fingerprint()
    swapped = {**pictures, "small": pictures["large"], "large": pictures["small"]}
    assert fingerprint_pictures(swapped) != whole


def test_pictures_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = ["folder", *(f"{number:02d}.png" for number in range(12))]
    with pytest.raises(InputError) as error:
        fingerprint_pictures({name: tmp_path / name for name in names})
    assert error.value.problems[0] == f"image {tmp_path / 'folder'}: cannot be read (Is a directory)."
    assert error.value.problems[1] == f"image {tmp_path / '00.png'}: cannot be read (No such file or directory)."
    assert error.value.problems[10:] == ("and 3 more.",)


def _config(family: str = "llava", method: str = "keeplora", **task: Any) -> RunConfig:
    paths = {"name": "a", "train": "train", "test": "test"}
    content = {
        "name": "run",
        "data_root": "data",
        "benchmark": {"name": "b", "tasks": [{**paths, "images": "i", "scorer": "exact", **task}]},
        "model": {"family": family, "path": "model"},
        "method": {"name": method},
        "lora": {"rank": 1, "alpha": 1.0},
        "training": {"learning_rate": 1.0, "global_batch": 1, "micro_batch": 1},
    }
    if family != "llava":
        content["benchmark"]["tasks"] = [{**paths, "classes": ["x", "y"]}]
    return RunConfig.model_validate(content)


def test_the_code_that_a_run_uses_is_hashed_and_no_other() -> None:
    code = fingerprint_code(_config())
    package = Path(llava_cl.__file__).parent
    everything = {str(file.relative_to(package)) for file in package.rglob("*.py")}
    shows = {name for name in everything if name.startswith(("report/", "cli.py"))}
    beside = {f"pipeline/{name}.py" for name in ("dry_run", "export", "hub", "image_classes", "model_card")}
    others = {f"methods/{name}.py" for name in known_methods()} - {"methods/keeplora.py"}
    others |= {f"models/{name}.py" for name in ("classes", "clip", "smolvlm", "vit", "vit_timm")}
    assert everything - code.keys() == {*shows, *beside, *others, "evaluation/captions.py"}
    assert code["methods/keeplora.py"] == hashlib.sha256((package / "methods/keeplora.py").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "more", "less"),
    [
        ({"method": "olora"}, {"methods/olora.py"}, {"methods/keeplora.py"}),
        ({"scorer": "caption"}, {"evaluation/captions.py"}, set()),
        ({"scorer": "caption_overlap"}, {"evaluation/captions.py"}, set()),
        ({"family": "smolvlm"}, {"models/smolvlm.py", "models/generation.py"}, {"models/llava.py"}),
        ({"family": "vit"}, {"models/vit.py", "models/vit_timm.py", "pipeline/image_classes.py"}, {"models/llava.py"}),
        ({"method": "mine"}, {"methods/olora.py", "methods/inflora.py"}, set()),
    ],
)
def test_a_configuration_chooses_its_code(change: dict[str, Any], more: set[str], less: set[str]) -> None:
    usual, other = fingerprint_code(_config()), fingerprint_code(_config(**change))
    assert more <= other.keys()
    assert not less & other.keys()
    assert less <= usual.keys()


def test_every_choice_of_code_is_a_choice_of_the_configuration() -> None:
    """An import inside a function anywhere else would be left out of the fingerprint without a word."""
    package = Path(llava_cl.__file__).parent
    inside = set()
    for name in {**fingerprint_code(_config()), **fingerprint_code(_config("vit", "olora", scorer="caption"))}:
        tree = ast.parse((package / name).read_text())
        for node in ast.walk(tree):
            assert getattr(node, "level", 0) == 0, f"{name}: a relative import, which is not followed"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.With):
                imports = [own for own in ast.walk(node) if isinstance(own, ast.Import | ast.ImportFrom)]
                inside |= {name for own in imports if "llava_cl" in ast.unparse(own)}
    assert inside == {"methods/contract.py", "models/contract.py", "pipeline/samples.py"}
    assert {f"methods/{name}.py" for name in known_methods()} <= {
        str(file.relative_to(package)) for file in package.glob("methods/*.py")
    }
    assert {file.stem for file in package.glob("models/*.py")} >= _families().keys()


def test_code_that_changes_shows_where_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = fingerprint_code(_config())
    package = tmp_path / "llava_cl"
    shutil.copytree(Path(llava_cl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("llava_cl.store.fingerprint._PACKAGE", package)
    assert changed_code(code, fingerprint_code(_config())) == []
    for name in ("methods/olora.py", "models/clip.py", "report/page.py", "cli.py", "evaluation/captions.py"):
        (package / name).write_text("changed = True")
    assert changed_code(code, fingerprint_code(_config())) == []
    (package / "subspace" / "bases.py").write_text("half a line(")
    (package / "store" / "more.py").write_text("")
    init = package / "data" / "__init__.py"
    init.write_text("import llava_cl.store.more\n" + init.read_text())
    changed = ["data/__init__.py", "store/more.py", "subspace/bases.py"]
    assert changed_code(code, fingerprint_code(_config())) == changed
    with_olora = fingerprint_code(_config(method="olora"))
    assert with_olora["methods/olora.py"] == hashlib.sha256(b"changed = True").hexdigest()
