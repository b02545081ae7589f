"""Whatever is wrong with a checkpoint of any family and layout is one message, before anything is spent."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_vit
import torch
from layouts import TOWER, write_original
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tiny
import tiny_clip
import tiny_smolvlm
import tiny_vit
from llava_cl.config import RunConfig
from llava_cl.errors import InputError
from llava_cl.models import family
from llava_cl.pipeline.data_checks import check_records
from llava_cl.pipeline.preflight import check_setup
from runs import tiny_config

Damage = Callable[[Path], object]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
KINDS = ["llava", "original", "smolvlm", "clip", "vit", "timm"]


def _content(kind: str, folder: Path) -> dict[str, Any]:
    """A run file over a tiny checkpoint of one family and layout, and its data."""
    if kind in ("vit", "timm"):
        content = tiny_vit.run_content(folder)
        if kind == "timm":
            content["model"]["path"] = str(test_vit.write_timm(folder / "timm", test_vit.timm_weights()))
        return content
    if kind == "clip":
        return tiny_clip.run_content(folder)
    content = tiny.run_content(folder)
    if kind == "original":
        content["model"]["path"] = str(write_original(folder / "llava"))
    if kind == "smolvlm":
        content["model"].update(family="smolvlm", path=str(tiny_smolvlm.build_smolvlm(folder / "smolvlm")))
    return content


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A folder and run file of each kind, made when it is first asked for."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, _content(kind, folder)
        return made[kind]

    return make


@pytest.fixture
def damaged(intact: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path) -> Callable[..., RunConfig]:
    """The configuration of a copy whose checkpoint is damaged."""

    def make(kind: str, damage: Damage, *overrides: str) -> RunConfig:
        folder, content = intact(kind)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        copied = json.loads(json.dumps(content).replace(str(folder), str(tmp_path)))
        damage(Path(copied["model"]["path"]))
        return tiny_config(tmp_path, copied, *overrides)

    return make


def _set(name: str, keys: str, value: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text())
        *above, last = keys.split(".")
        place = content
        for key in above:
            place = place[key]
        place[last] = value
        file.write_text(json.dumps(content))

    return damage


def _config(keys: str, value: Any) -> Damage:
    return _set("config.json", keys, value)


def _file(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def _index(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def _typed(dtype: torch.dtype) -> Damage:
    """One weight in another type; what the weights do not need may have any."""

    def damage(folder: Path) -> None:
        file = next(iter(sorted(folder.glob("*model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))))
        tensors = torch.load(file) if file.suffix == ".bin" else load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = tensors[name].to(dtype)
        torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<x{number}>" for number in range(100)])
    tokenizer.save_pretrained(folder)


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


IMAGES, TOKENS = "preprocessor_config.json", "tokenizer_config.json"
CASES: dict[str, tuple[str, Damage, str]] = {
    "unknown sub-config": ("llava", _config("text_config.model_type", "nope"), "cannot be read .*nope"),
    "no heads": ("llava", _config("text_config.num_attention_heads", 0), "cannot be read .*ZeroDivision"),
    "no key heads": ("llava", _config("text_config.num_key_value_heads", 0), "no model that can be built"),
    "a text for a number": ("llava", _config("text_config.num_hidden_layers", "2"), "'num_hidden_layers' expected int"),
    "unknown activation": ("llava", _config("text_config.hidden_act", "nope"), "no model that can be built .*nope"),
    "layer 99": (
        "llava",
        _config("vision_feature_layer", 99),
        r"config\.json: images are read at layer 99 ",
    ),
    "a layer below": ("llava", _config("vision_feature_layer", -4), "layer -4 of the vision tower, which has 2"),
    "several layers": ("llava", _config("vision_feature_layer", [-1, 3]), r"layer \[-1, 3\] of the vision"),
    "negative image size": ("llava", _config("vision_config.image_size", -16), "image_size: -16 is no number"),
    "image token": ("llava", _config("image_token_index", 64), "64 rows, and 1 tokens have none: the image token"),
    "end of answers": ("llava", _set("generation_config.json", "eos_token_id", 64), "64 rows, .*ends an answer"),
    "generation": ("llava", _file("generation_config.json", "{"), r"generation_config\.json: .*not valid JSON"),
    "added tokens": ("llava", _more_tokens, r"64 rows, and \d\d tokens have none: <x\d\d> has the id"),
    "tokenizer {}": ("llava", _file("tokenizer.json", "{}"), "the tokenizer cannot be loaded"),
    "tokenizer of LFS": ("llava", _file("tokenizer.json", LFS), r"tokenizer\.json: is a pointer of Git LFS"),
    "tokenizer's list": ("llava", _file(TOKENS, "[]"), r"tokenizer_config\.json: holds a JSON list"),
    "no tokenizer": ("llava", lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
    "no bos": ("llava", _set(TOKENS, "bos_token", None), "has no bos token"),
    "no mean": ("llava", _set(IMAGES, "image_mean", None), f"{IMAGES}: image_mean is None, but must be three numbers"),
    "a mean of texts": ("smolvlm", _set(IMAGES, "image_mean", ["a"] * 3), "image_mean is .* must be three numbers"),
    "deviation 0": ("clip", _set(IMAGES, "image_std", [0.5, 0, 0.5]), "image_std is .* three numbers above 0"),
    "std nan": (
        "vit",
        _set(IMAGES, "image_std", [0.5, float("nan"), 1]),
        "image_std is .* three numbers above 0",
    ),
    "timm's deviation": (
        "timm",
        _config("pretrained_cfg.std", [0, 1, 1]),
        r"config\.json: pretrained_cfg\.std is .* above 0",
    ),
    "timm's nothing": ("timm", _config("pretrained_cfg", None), r"pretrained_cfg is None, but must be an object"),
    "index {}": ("llava", _index({}), "field 'weight_map' is missing"),
    "index list": ("clip", _index([]), r"index\.json: holds a JSON list"),
    "index of a list": ("vit", _index({"weight_map": ["a"]}), "weight_map names .*, which is no file below"),
    "index of numbers": ("vit", _index({"weight_map": {"a": 3}}), "weight_map names .*, which is no file below"),
    "index lacks a file": ("smolvlm", _index({"weight_map": {"a": "model-2.safetensors"}}), "model-2.*: is missing"),
    "index leaves": (
        "vit",
        _index({"weight_map": {"a": "../w.safetensors"}}),
        "weight_map names .*, which is no file below",
    ),
    "no JSON": ("clip", _file("config.json", "{"), r"config\.json: .*not valid JSON"),
    "weights of LFS": ("llava", _file("model.safetensors", LFS), r"model\.safetensors: is a pointer of Git LFS"),
    "bin of LFS": ("original", _file("pytorch_model-00001-of-00002.bin", LFS), r"\.bin: is a pointer of Git LFS"),
    "empty bin": ("original", _file("pytorch_model-00001-of-00002.bin", ""), r"\.bin: the weights cannot be read"),
    "timm of LFS": ("timm", _file("model.safetensors", LFS), r"model\.safetensors: is a pointer of Git LFS"),
    **{f"int64 {kind}": (kind, _typed(torch.int64), r"1 weights are no floats \(.* is .*64") for kind in KINDS},
    "int8": ("llava", _typed(torch.int8), r"is I8\); give a checkpoint in 16 or 32 bits"),
    "float8": ("vit", _typed(torch.float8_e4m3fn), r"is F8_E4M3\)"),
    "select layer": ("original", _config("mm_vision_select_layer", 99), "images are read at layer 99"),
    "no vocabulary": ("original", lambda folder: (folder / "tokenizer.model").unlink(), "holds no tokenizer"),
    "tower's LFS": ("original", lambda p: _file("pytorch_model.bin", LFS)(p.parent / TOWER), "is a pointer of Git LFS"),
    "tower's heads": (
        "original",
        lambda p: _config("vision_config.num_attention_heads", 0)(p.parent / TOWER),
        "ZeroDivision",
    ),
    "no padding": ("smolvlm", _set(TOKENS, "pad_token", None), "no token that pads"),
    "a new padding": ("smolvlm", _set(TOKENS, "pad_token", "<new>"), "1 tokens have none: <new> has the id"),
    "scale 0": ("smolvlm", _config("scale_factor", 0), "cannot be read .*ZeroDivision"),
    "scale 3": ("smolvlm", _config("scale_factor", 3), "scale_factor 3 cannot merge 4 patches"),
    "CLIP's end": ("clip", _config("text_config.eos_token_id", 12), "the tokenizer is another model's"),
    "CLIP's tokens": ("clip", _file("tokenizer.json", "{}"), "the tokenizer cannot be loaded"),
    "no patches": ("vit", _config("patch_size", 0), "no model that can be built"),
    "timm's width": ("timm", lambda p: save_file(_narrow(p), p / "model.safetensors"), "63 features are no multiple"),
    **{
        f"not there {kind}": (kind, _no_folder, "holds no config.json; models are not downloaded: .*'hf download")
        for kind in ("llava", "vit")
    },
}


def _narrow(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    return {**weights, "patch_embed.proj.weight": weights["patch_embed.proj.weight"][:63]}


@pytest.mark.parametrize(("kind", "damage", "told"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_one_message(damaged: Callable[..., RunConfig], kind: str, damage: Damage, told: str) -> None:
    config = damaged(kind, damage)
    with pytest.raises(InputError, match=told) as error:
        check_setup(config, 1)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_intact_checkpoint_passes(damaged: Callable[..., RunConfig], kind: str) -> None:
    check_setup(damaged(kind, lambda folder: None), 1)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "clip", "vit"])
def test_a_processor_of_transformers_5_is_read(damaged: Callable[..., RunConfig], kind: str, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        old = folder / IMAGES
        content = {**json.loads(old.read_text()), "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        old.unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))

    config = damaged(kind, damage)
    check_setup(config, 1)
    own = family(config.model)
    assert (own.image_spec().mean, own.image_spec().std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    if kind == "clip":  # whose export keeps the file of the base
        own.save(own.load(torch.device("cpu")), tmp_path, "hf")
        assert "0.1" in (tmp_path / "processor_config.json").read_text()


def test_a_file_that_may_not_be_read_is_named(
    damaged: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the refusal of the system is put in its place."""
    config = damaged("llava", lambda folder: None)
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors: .*Permission denied"):
        check_setup(config, 1)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.max_length=257", "training.max_length: 257 is more than the model's 256 positions"),
        ("evaluation.max_new_tokens=252", "252 after the 4 tokens of an image leave no room"),
    ],
)
def test_lengths_beyond_the_positions(damaged: Callable[..., RunConfig], override: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_setup(damaged("llava", lambda folder: None, override), 1)


def test_a_question_beyond_the_positions(damaged: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A tiny prompt has 6 words around the question and 4 tokens of the image; 256 positions hold 239 words more."""
    config = damaged("llava", lambda folder: None)
    file = tmp_path / "data" / "Tone" / "test.json"
    questions = json.loads(file.read_text())

    def ask(words: int) -> None:
        questions[3]["text"] = " ".join(["red"] * words)
        file.write_text(json.dumps(questions))

    ask(1)
    check_records(config)
    ask(300)
    with pytest.raises(InputError, match=r"Tone/test\.json: 1 questions are too long .* record 3 \(id Tone-27\)"):
        check_records(config)
