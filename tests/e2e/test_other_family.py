"""A second family, of another architecture and chat format, goes through the whole of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, SmolVLMForConditionalGeneration

from llava_cl.config import ModelConfig, RunConfig
from llava_cl.data import chat_format, load_image, preprocess_image
from llava_cl.models import family
from llava_cl.pipeline.export import export
from llava_cl.store import load_tensors
from runs import run_here, tiny_config
from tiny import run_content
from tiny_smolvlm import IMAGE_TOKEN_ID, IMAGE_TOKENS, build_smolvlm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def config(tiny_run: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    content = run_content(tiny_run)
    content["model"] = {"family": "smolvlm", "path": str(model_folder), "dtype": "float32"}
    folder = tmp_path_factory.mktemp("config")
    return tiny_config(folder, content, "training.epochs=6", "training.learning_rate=0.02")


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    run_here(config, output)
    return output


def test_the_chat_format_is_the_models_own(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    chat = chat_format("smolvlm", tokenizer, IMAGE_TOKEN_ID, IMAGE_TOKENS)
    turns = [
        {"from": "human", "value": "What tone <image>"},
        {"from": "gpt", "value": "dark"},
        {"from": "human", "value": "Which"},
        {"from": "gpt", "value": "grey ."},
    ]
    encoded = chat.conversation(turns, max_length=100, images_per_turn=1)
    written = (
        "<|im_start|>User:<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
        "What tone<end_of_utterance>\nAssistant: dark<end_of_utterance>\n"
        "User: Which<end_of_utterance>\nAssistant: grey .<end_of_utterance>"
    )
    assert encoded["input_ids"] == tokenizer(written, add_special_tokens=False)["input_ids"]
    answers = tokenizer(" dark<end_of_utterance> grey .<end_of_utterance>", add_special_tokens=False)["input_ids"]
    assert [label for label in encoded["labels"] if label != -100] == answers
    assert not encoded["unmatched"]
    prompt = written.split(" dark")[0]
    assert chat.prompt("What tone", images=1) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = chat.prompt("What", images=2)
    assert both.count(IMAGE_TOKEN_ID) == 2 * IMAGE_TOKENS
    text = chat.prompt("What", images=0)
    expected = "<|im_start|>User: What<end_of_utterance>\nAssistant:"
    assert text == tokenizer(expected, add_special_tokens=False)["input_ids"]
    cut = chat.conversation(turns, max_length=8, images_per_turn=1)
    assert len(cut["input_ids"]) == 8 - 1 + IMAGE_TOKENS
    assert chat.conversation(turns[:1], max_length=100, images_per_turn=1)["unmatched"]


def test_the_loss_is_transformers_own(config: RunConfig, model_folder: Path) -> None:
    own = family(config.model)
    plain = SmolVLMForConditionalGeneration.from_pretrained(model_folder)
    spec = own.image_spec()
    assert (spec.size, spec.tokens, spec.token_id) == (16, IMAGE_TOKENS, IMAGE_TOKEN_ID)
    chat = chat_format(own.chat, own.tokenizer(), spec.token_id, spec.tokens)
    encoded = chat.conversation(
        [{"from": "human", "value": "<image> What"}, {"from": "gpt", "value": "red"}], max_length=99, images_per_turn=1
    )
    ids, labels = (torch.tensor([encoded[key]]) for key in ("input_ids", "labels"))
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        reference = plain(input_ids=ids, attention_mask=mask, pixel_values=pixels[None], labels=labels).loss
        loss = own.load(CPU)(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)["loss"]
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)


def test_a_run_learns_and_protects(run: Path, config: RunConfig) -> None:
    for stage, task in ((1, "Colour"), (2, "Tone")):
        folder = run / "stages" / f"{stage:02d}-{task}"
        losses = [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
        assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    model = family(config.model).load(CPU)
    targets = family(config.model).linear_targets(model)
    assert len(targets) == 2 * 7
    for name in targets:
        basis = load_tensors(run / "stages" / "00-base" / "subspace.safetensors")[0][name]
        added = load_tensors(run / "stages" / "01-Colour" / "subspace.safetensors")[0].get(name)
        protected = basis if added is None else torch.cat([basis, added], dim=1)
        a = load_tensors(run / "stages" / "02-Tone" / "adapter" / "adapter_model.safetensors")[0]
        rows = a[f"base_model.model.{name}.lora_A.weight"]
        assert (rows @ protected).abs().max() < 1e-5, name


def test_an_export_answers_as_the_run_did(run: Path, tiny_run: Path, tmp_path: Path) -> None:
    export(run, 2, tmp_path / "out", "hf")
    plain: Any = SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    own = family(ModelConfig(family="smolvlm", path=tmp_path / "out", dtype="float32"))
    chat = chat_format(own.chat, own.tokenizer(), IMAGE_TOKEN_ID, IMAGE_TOKENS)
    answers = []
    for record in json.loads((tiny_run / "data" / "Colour" / "test.json").read_text()):
        ids = torch.tensor([chat.prompt(record["text"], images=1)])
        image = load_image(record["image"], tiny_run / "data" / "images")
        pixels = torch.from_numpy(preprocess_image(image, size=16, mean=[0.5] * 3, std=[0.5] * 3))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[None, None]}
        new = plain.generate(**batch, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        answers.append(own.tokenizer().decode(new, skip_special_tokens=True).strip())
    lines = (run / "stages" / "02-Tone" / "predictions" / "Colour.jsonl").read_text().splitlines()
    assert answers == [json.loads(line)["text"] for line in lines]
