"""The LLaVA family: what it loads and refuses, which linears it targets, how it reads images and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_cl.config import ModelConfig
from llava_cl.data import collate_prompts
from llava_cl.errors import InputError
from llava_cl.models import ModelFamily, family
from tiny_samples import IMAGE_TOKEN_ID, PAD_ID

CPU = torch.device("cpu")
LEAVES = (
    *(f"self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
)


@pytest.fixture(scope="module")
def llava(tiny_run: Path) -> ModelFamily:
    return family(ModelConfig(path=tiny_run / "model", dtype="float32"))


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


def _load(folder: Path) -> nn.Module:
    return family(ModelConfig(path=folder, dtype="float32")).load(CPU)


def _edit_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_loads_the_weights_frozen_and_in_evaluation_mode(tiny_run: Path) -> None:
    plain = dict(LlavaForConditionalGeneration.from_pretrained(tiny_run / "model").named_parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model = family(ModelConfig(path=tiny_run / "model", dtype=str(dtype).removeprefix("torch."))).load(CPU)
        own = dict(model.named_parameters())
        assert own.keys() == plain.keys()
        for name, parameter in own.items():
            assert torch.equal(parameter, plain[name].to(dtype)), name
            assert not parameter.requires_grad
        assert not any(module.training for module in model.modules())


def test_targets_are_the_seven_linears_of_every_decoder_block(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    targets = llava.linear_targets(model)
    assert set(targets) == {f"model.language_model.layers.{block}.{leaf}" for block in (0, 1) for leaf in LEAVES}
    for name, target in targets.items():
        assert target.module is model.get_submodule(name)


def test_linears_share_a_source_if_and_only_if_they_share_an_input(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    targets = llava.linear_targets(model)
    inputs: dict[str, torch.Tensor] = {}
    for name, target in targets.items():
        target.module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(input_ids=torch.tensor([[1, 7, 8, 9]]))
    for name in targets:
        for other in targets:
            assert (inputs[name] is inputs[other]) == (targets[name].source == targets[other].source), (name, other)


def test_skeleton_has_all_targets_and_no_memory(llava: ModelFamily) -> None:
    skeleton = llava.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = {name: target.module.weight.shape for name, target in llava.linear_targets(skeleton).items()}
    assert shapes == {name: t.module.weight.shape for name, t in llava.linear_targets(llava.load(CPU)).items()}


def test_projector_prefix_names_the_projector(llava: ModelFamily) -> None:
    prefix = llava.projector_prefix()
    assert prefix is not None
    assert [name for name, _ in llava.load(CPU).get_submodule(prefix).named_parameters()] == [
        "linear_1.weight",
        "linear_1.bias",
        "linear_2.weight",
        "linear_2.bias",
    ]


def test_image_spec_is_read_from_the_checkpoint(llava: ModelFamily, copied: Path) -> None:
    spec = llava.image_spec()
    assert (spec.size, spec.tokens, spec.token_id) == (16, 4, IMAGE_TOKEN_ID)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert spec.std == (0.26862954, 0.26130258, 0.27577711)
    _edit_json(copied / "config.json", lambda content: content.update(vision_feature_select_strategy="full"))
    assert family(ModelConfig(path=copied)).image_spec().tokens == 5


def test_image_spec_falls_back_on_what_a_config_leaves_out(copied: Path) -> None:
    def leave_out(content: dict) -> None:
        del content["vision_config"]["image_size"], content["vision_config"]["patch_size"]
        del content["vision_feature_select_strategy"]

    _edit_json(copied / "config.json", leave_out)
    spec = family(ModelConfig(path=copied)).image_spec()
    assert (spec.size, spec.tokens) == (224, 49)


def test_a_missing_image_processor_is_named(copied: Path) -> None:
    _edit_json(copied / "preprocessor_config.json", lambda content: content.pop("image_std"))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: image_std is missing"):
        family(ModelConfig(path=copied)).image_spec()
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json: missing"):
        family(ModelConfig(path=copied)).image_spec()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda tensors, key: tensors.pop(key), "missing keys: .*layers.1.mlp.down_proj.weight"),
        (lambda tensors, key: tensors.update({"extra.weight": torch.ones(2)}), "unexpected keys: extra.weight"),
        (lambda tensors, key: tensors.update({key: torch.ones(24, 5)}), "mismatched keys: .*layers.1.mlp.down_proj"),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(copied: Path, spoil: Callable, named: str) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    spoil(tensors, "language_model.model.layers.1.mlp.down_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=named) as error:
        _load(copied)
    assert str(copied) in str(error.value)


def test_a_truncated_checkpoint_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot be read"):
        _load(copied)


def test_a_checkpoint_without_weights_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        _load(copied)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"model\.path: .* holds no config\.json"),
        ('{"model_type": "llama"}', "model_type is 'llama', expected 'llava' or 'llava_llama'"),
        ('{"model_type": ', "not valid JSON"),
    ],
)
def test_a_folder_that_is_no_llava_is_refused(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=named):
        family(ModelConfig(path=tmp_path))


def test_an_unknown_family_is_refused(tiny_run: Path) -> None:
    with pytest.raises(InputError, match=r"model\.family: unknown 'ViT'; known: clip, llava, smolvlm, vit"):
        family(ModelConfig(family="ViT", path=tiny_run / "model"))


def test_left_padded_batches_get_the_answers_of_single_prompts(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    model.generation_config.eos_token_id = None  # else the rows would end at different places
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, length in enumerate((3, 11, 6, 1)):
        ids = [1, *[IMAGE_TOKEN_ID] * 4, *torch.randint(4, 64, (length,), generator=generator).tolist()]
        samples.append(
            {"input_ids": ids, "index": index, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
        )
    samples.append({"input_ids": [1, 20, 30], "index": 4})

    def answers(batch: list[dict]) -> list[list[int]]:
        inputs = collate_prompts(batch, PAD_ID)
        del inputs["index"]
        with torch.inference_mode():
            return llava.generate(model, inputs, 6).tolist()

    together = answers(samples)
    assert together == [answers([sample])[0] for sample in samples]
    assert all(len(row) == 6 for row in together)
    assert len({tuple(row) for row in together}) > 1


def _prompts(lengths: tuple[int, ...], images: tuple[str, ...]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    pixels = {image: torch.randn(1, 3, 16, 16, generator=generator) for image in sorted(set(images))}
    samples = []
    for index, (length, image) in enumerate(zip(lengths, images, strict=True)):
        ids = [1, *[IMAGE_TOKEN_ID] * 4, *torch.randint(4, 64, (length,), generator=generator).tolist()]
        samples.append(
            {"input_ids": ids, "index": index, "images": (image,), "start": 5, "pixel_values": pixels[image]}
        )
    return samples


def _answers(llava: ModelFamily, model: nn.Module, samples: list[dict], tokens: int) -> list[list[int]]:
    batch = collate_prompts(samples, PAD_ID)
    del batch["index"]
    with torch.inference_mode():
        return llava.generate(model, batch, tokens).tolist()


def test_a_shared_start_is_read_once_and_changes_no_answer(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    model.generation_config.eos_token_id = None
    samples = _prompts((3, 11, 6, 1, 6), ("a", "b", "a", "a", "b"))
    alone = [_answers(llava, model, [sample], 6)[0] for sample in samples]
    seen: list[tuple[int, ...]] = []
    model.get_submodule("model.vision_tower").register_forward_hook(
        lambda _module, _inputs, output: seen.append(tuple(output.last_hidden_state.shape[:1]))
    )
    assert _answers(llava, model, samples, 6) == alone
    assert seen == [(2,)]
    assert len({tuple(row) for row in alone}) > 2


def test_rows_that_have_ended_leave_the_batch(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    model.generation_config.eos_token_id = None
    samples = _prompts((3, 11, 6, 1, 6, 9), ("a", "b", "c", "d", "e", "f"))
    free = _answers(llava, model, samples, 12)
    # Ids that end some of the answers early, and one of them not at all.
    stops = sorted({row[2] for row in free[:4]})
    model.generation_config.eos_token_id = stops
    sizes: list[int] = []
    model.get_submodule("lm_head").register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    got = _answers(llava, model, samples, 12)
    for row, whole in zip(got, free, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        assert row == (whole[:end] + [PAD_ID] * len(row))[: len(row)]
    assert sizes[0] == len(samples)
    assert sizes[-1] < len(samples)
    assert len(sizes) == len(got[0])


def test_generation_computes_no_logits_but_the_last(llava: ModelFamily) -> None:
    """Those of a whole batch of prompts would be the largest tensor of an evaluation."""
    model = llava.load(CPU)
    shapes = []
    model.get_submodule("lm_head").register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    ids = torch.tensor([[1, 20, 30, 41]])
    with torch.inference_mode():
        llava.generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2)
    assert {shape[1] for shape in shapes} == {1}


def test_generation_is_greedy(llava: ModelFamily) -> None:
    model = llava.load(CPU)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 20, 30, 41]])
    grown = ids
    with torch.inference_mode():
        for _ in range(4):
            grown = torch.cat([grown, model(input_ids=grown).logits[:, -1:].argmax(-1)], dim=1)
        answer = llava.generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4)
    assert answer.tolist() == grown[:, 4:].tolist()
