"""Both layouts of LLaVA-1.5 checkpoints: read, refused, written again bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import SENTENCEPIECE, TOWER, VOCABULARY, plain_model, write_original, write_transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava_cl.config import ModelConfig
from llava_cl.data import encode_prompt, preprocess_image
from llava_cl.data.conversation import VICUNA_V1
from llava_cl.errors import InputError
from llava_cl.models import ModelFamily, family

CPU = torch.device("cpu")
LAYOUTS: dict[str, Callable[..., Path]] = {
    "bin, two shards": write_original,
    "bin": lambda folder, **options: write_original(folder, shards=1, **options),
    "safetensors, three shards": lambda folder, **options: write_original(folder, binary=False, shards=3, **options),
    "safetensors": lambda folder, **options: write_original(folder, binary=False, shards=1, **options),
}


def _family(folder: Path, dtype: str = "float32", **options: Any) -> ModelFamily:
    return family(ModelConfig(path=folder, dtype=dtype, **options))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    for file in folder.glob("pytorch_model*.bin"):
        found.update(torch.load(file, weights_only=True))
    return found


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@torch.no_grad()
def _logits(model: Any, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), pixel_values=pixels.to(model.dtype)).logits.float()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the authors' layout; read it, never write to it."""
    return write_original(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_layouts_give_the_same_logits(write: Callable[..., Path], dtype: torch.dtype, tmp_path: Path) -> None:
    families = [_family(write(tmp_path / "a", dtype=dtype)), _family(write_transformers(tmp_path / "b", dtype=dtype))]
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits = []
    for own in families:
        spec = own.image_spec()
        assert (spec.size, spec.tokens) == (16, 4)
        ids = encode_prompt(
            "What is this?", own.tokenizer(), image_token_id=spec.token_id, num_image_tokens=spec.tokens
        )
        logits.append(_logits(own.load(CPU), ids, pixels)[..., :VOCABULARY])
    assert torch.equal(*logits)
    # Independent of our code: transformers' own class over the weights, its image token where nothing else stands.
    reference = plain_model(VOCABULARY - 1, dtype=dtype)
    for parameter in reference.parameters():
        parameter.data = parameter.data.float()
    spec = families[0].image_spec()
    ids = encode_prompt("What is this?", families[0].tokenizer(), image_token_id=VOCABULARY - 1, num_image_tokens=4)
    assert torch.equal(_logits(reference, ids, pixels), logits[0])


def test_the_image_token_takes_no_word_away(published: Path, tmp_path: Path) -> None:
    assert _family(published).image_spec().token_id == 3
    assert _family(published).tokenizer().convert_ids_to_tokens(3) == "<0x00>"
    assert _family(write_transformers(tmp_path / "hf")).image_spec().token_id == VOCABULARY
    wider = shutil.copytree(published.parent, tmp_path / "wider") / "llava"
    content = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**content, "vocab_size": VOCABULARY + 8}))
    assert _family(wider).image_spec().token_id == VOCABULARY


def test_text_with_the_image_tokens_character_is_refused(published: Path) -> None:
    own = _family(published)
    with pytest.raises(InputError, match="stands for images"):
        encode_prompt("what\x00is this", own.tokenizer(), image_token_id=3, num_image_tokens=4)


@pytest.mark.parametrize("place", ["beside", "inside", "given"])
def test_the_tower_is_found(published: Path, place: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(published.parent, tmp_path / "root"))
    options = {}
    if place == "inside":
        (root / "llava" / "openai").mkdir()
        (root / TOWER).rename(root / "llava" / "openai" / TOWER)
    elif place == "given":
        (root / TOWER).rename(tmp_path / "elsewhere")
        options["vision_tower"] = tmp_path / "elsewhere"
    own = _family(root / "llava", **options)
    assert own.folders()[0] == root / "llava"
    assert (own.folders()[1] / "preprocessor_config.json").is_file()
    own.load(CPU)


def test_a_missing_tower_is_named(published: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(published, tmp_path / "llava"))
    with pytest.raises(InputError, match=rf"vision tower openai/{TOWER} is in none of .*model\.vision_tower"):
        _family(alone)


def test_a_tower_inside_the_checkpoint_is_used(published: Path, tmp_path: Path) -> None:
    """Checkpoints that were trained further are often saved whole."""
    root = Path(shutil.copytree(published.parent, tmp_path / "root"))
    tower = torch.load(root / TOWER / "pytorch_model.bin", weights_only=True)
    shard = root / "llava" / "pytorch_model-00001-of-00002.bin"
    index = root / "llava" / "pytorch_model.bin.index.json"
    held = {f"model.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items() if "vision" in name}
    torch.save({**torch.load(shard, weights_only=True), **held}, shard)
    content = json.loads(index.read_text())
    content["weight_map"].update(dict.fromkeys(held, shard.name))
    index.write_text(json.dumps(content))
    vision = _family(root / "llava").load(CPU).model.vision_tower.state_dict()
    plain = _family(published).load(CPU).model.vision_tower.state_dict()
    for name, tensor in plain.items():
        assert torch.equal(vision[name], tensor + 1), name
    own = _family(root / "llava")
    (root / "out").mkdir()
    own.save(own.load(CPU), root / "out", "llava")
    for name, tensor in _family(root / "out").load(CPU).model.vision_tower.state_dict().items():
        assert torch.equal(vision[name], tensor), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "mean"}, "mm_vision_select_feature is 'mean'"),
    ],
)
def test_other_kinds_of_llava_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        _family(write_original(tmp_path, **change))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda tensors, key: tensors.pop(key), "missing keys: .*layers.1.mlp.down_proj.weight"),
        (lambda tensors, key: tensors.update({"extra.weight": torch.ones(2)}), "unexpected keys: extra.weight"),
        (lambda tensors, key: tensors.update({key: torch.ones(24, 5)}), "mismatched keys: .*layers.1.mlp.down_proj"),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(spoil: Callable, named: str, tmp_path: Path) -> None:
    folder = write_original(tmp_path, shards=1)
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    spoil(tensors, "model.layers.1.mlp.down_proj.weight")
    torch.save(tensors, file)
    with pytest.raises(InputError, match=named):
        _family(folder).load(CPU)


def test_a_tower_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_original(tmp_path)
    file = folder.parent / TOWER / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["vision_model.encoder.layers.0.mlp.fc1.bias"]
    torch.save(tensors, file)
    with pytest.raises(InputError, match=rf"{TOWER}: missing keys: .*layers.0.mlp.fc1.bias"):
        _family(folder).load(CPU)


def test_a_bin_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = write_original(tmp_path, shards=1)

    class Trap:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        _family(folder).load(CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_original_to_original_is_bit_equal(dtype: str, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "a", dtype=getattr(torch, dtype))
    own = _family(folder, "auto")
    (tmp_path / "a" / "out").mkdir()
    own.save(own.load(CPU), tmp_path / "a" / "out", "llava")
    _assert_equal(_tensors(tmp_path / "a" / "out"), _tensors(folder))
    assert (tmp_path / "a" / "out" / "tokenizer.model").read_bytes() == SENTENCEPIECE.read_bytes()
    again = _family(tmp_path / "a" / "out", "auto")
    assert again.image_spec() == own.image_spec()
    before = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "a" / "out" / "config.json").read_text()) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("published", [True, False])
def test_transformers_to_transformers_is_bit_equal(dtype: str, published: bool, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "a", published=published, dtype=getattr(torch, dtype))
    own = _family(folder, "auto")
    (tmp_path / "b").mkdir()
    own.save(own.load(CPU), tmp_path / "b", "hf")
    _assert_equal(_tensors(tmp_path / "b"), _tensors(folder))


def test_original_to_transformers_and_back_is_bit_equal(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "a")
    converted, back = tmp_path / "hf", tmp_path / "a" / "back"
    for source, target, layout in ((folder, converted, "hf"), (converted, back, "llava")):
        own = _family(source)
        target.mkdir()
        own.save(own.load(CPU), target, layout)
    _assert_equal(_tensors(back), _tensors(folder))
    assert _family(back).image_spec() == _family(folder).image_spec()
    # The tower, which the original names and this one holds.
    held = _tensors(back / "vision_tower")
    for name, tensor in torch.load(folder.parent / TOWER / "pytorch_model.bin", weights_only=True).items():
        if name.startswith("vision_model."):
            assert torch.equal(held.get(name, held.get(name.removeprefix("vision_model."))), tensor), name


def test_transformers_to_original_and_back_is_bit_equal(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "a")
    # As in the published conversion, rows beyond the vocabulary are not zero.
    own = _family(folder)
    model = own.load(CPU)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[VOCABULARY:] = 0.5
    first, original, second = tmp_path / "first", tmp_path / "original", tmp_path / "second"
    first.mkdir()
    own.save(model, first, "hf")
    for source, target, layout in ((first, original, "llava"), (original, second, "hf")):
        own = _family(source)
        target.mkdir()
        own.save(own.load(CPU), target, layout)
    _assert_equal(_tensors(second), _tensors(first))
    assert _family(second).image_spec() == _family(first).image_spec()


def test_the_layer_of_the_tower_is_the_checkpoints(tmp_path: Path) -> None:
    """The published layer is -2, which is also what is taken where a checkpoint says nothing."""
    own = _family(write_original(tmp_path / "a", mm_vision_select_layer=-1))
    spec = own.image_spec()
    ids = encode_prompt("What is this?", own.tokenizer(), image_token_id=spec.token_id, num_image_tokens=spec.tokens)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    reference = plain_model(VOCABULARY - 1)
    reference.config.image_token_id = VOCABULARY - 1
    expected = []
    for layer in (-1, -2):
        reference.config.vision_feature_layer = layer
        swapped = [VOCABULARY - 1 if id_ == spec.token_id else id_ for id_ in ids]
        expected.append(_logits(reference, swapped, pixels))
    model = own.load(CPU)
    assert torch.equal(_logits(model, ids, pixels)[..., :VOCABULARY], expected[0][..., :VOCABULARY])
    assert not torch.equal(*expected)
    for layout, key in (("hf", "vision_feature_layer"), ("llava", "mm_vision_select_layer")):
        folder = tmp_path / layout
        folder.mkdir()
        own.save(own.load(CPU), folder, layout)
        assert json.loads((folder / "config.json").read_text())[key] == -1
    converted = tmp_path / "converted"
    converted.mkdir()
    again = _family(tmp_path / "hf")
    again.save(again.load(CPU), converted, "llava")
    assert json.loads((converted / "config.json").read_text())["mm_vision_select_layer"] == -1


def test_an_export_never_answers_with_the_row_that_it_added(tmp_path: Path) -> None:
    """The added row's logit is 0, which wins where all others are negative."""
    own = _family(write_original(tmp_path / "a"))
    model = own.load(CPU)
    ids = own.tokenizer()("What is this?")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight.copy_(-hidden.expand_as(model.lm_head.weight))
    folder = tmp_path / "out"
    folder.mkdir()
    own.save(model, folder, "hf")
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    added = plain.config.image_token_index
    assert added == VOCABULARY
    logits = plain(input_ids=torch.tensor([ids])).logits[0, -1]
    assert logits.argmax() == added
    answer = plain.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=1, do_sample=False
    )
    assert answer[0, -1] != added


@pytest.mark.parametrize("write", [write_original, write_transformers], ids=["original", "transformers"])
def test_plain_transformers_reads_an_export_and_answers_alike(write: Callable[..., Path], tmp_path: Path) -> None:
    own = _family(write(tmp_path / "a"))
    model = own.load(CPU)
    spec = own.image_spec()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def answer(answering: Any, image_token_id: int) -> list[int]:
        ids = encode_prompt(
            "What is this?", own.tokenizer(), image_token_id=image_token_id, num_image_tokens=spec.tokens
        )
        batch = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "attention_mask": torch.ones(1, len(ids))}
        return answering.generate(**batch, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()

    ours = answer(model, spec.token_id)
    folder = tmp_path / "out"
    folder.mkdir()
    own.save(model, folder, "hf")
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    assert answer(plain, plain.config.image_token_index) == ours
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 37, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"{VICUNA_V1.system} USER: <image>\nWhat is this? ASSISTANT:"
    batch = processor(images=picture, text=prompt, return_tensors="pt")
    assert (batch["input_ids"] == plain.config.image_token_index).sum() == spec.tokens
    pixels = torch.from_numpy(preprocess_image(picture, size=16))
    torch.testing.assert_close(batch["pixel_values"][0], pixels, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == plain.config.image_token_index


def test_a_tokenizer_without_a_pad_token_pads_with_unk(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = family(ModelConfig(path=folder)).tokenizer()
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
