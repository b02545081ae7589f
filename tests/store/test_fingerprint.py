"""Fingerprints change with the content and the names of files, and with nothing else."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

import llava_cl
from llava_cl.errors import InputError
from llava_cl.store.fingerprint import fingerprint_code, fingerprint_files, fingerprint_model


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


def test_the_code_that_results_depend_on_is_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = fingerprint_code()
    assert {"__init__.py", "pipeline/steps.py", "methods/keeplora.py", "evaluation/scorers/__init__.py"} <= code.keys()
    assert not [name for name in code if name.startswith(("report/", "cli"))]
    package = tmp_path / "llava_cl"
    shutil.copytree(Path(llava_cl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("llava_cl.store.fingerprint._PACKAGE", package)
    assert fingerprint_code() == code
    (package / "subspace" / "bases.py").write_text("")
    assert {name for name, digest in fingerprint_code().items() if digest != code[name]} == {"subspace/bases.py"}
