"""A LLaVA of a few thousand parameters, its tokenizer, and a stream of coloured squares: built on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["USER", "ASSISTANT", ":", "?", "\n", "What", "Which", "colour", "is", "this", "tone", "red", "green", "blue"]
WORDS += ["dark", "light", "grey", "Answer", "with", "one", "word", "."]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
TONES = {"dark": (40, 40, 40), "light": (230, 230, 230), "grey": (128, 128, 128)}


def build_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that treats spaces and BOS as LLaMA's does."""
    vocabulary = ["<unk>", "<s>", "</s>", "<image>", "▁", *WORDS, *(f"▁{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"\n|[:?.]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.add_tokens([SYSTEM])
    fast.save_pretrained(folder)


def build_model(folder: Path, *, seed: int = 0) -> Path:
    """Writes a random model with its tokenizer in the layout of transformers; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def build_data(root: Path, *, train: int = 24, test: int = 9) -> Path:
    """Two tasks of coloured squares, `Colour` and `Tone`, in the layout of the benchmarks; returns the root."""
    for task, answers, noun in (("Colour", COLOURS, "colour"), ("Tone", TONES, "tone")):
        images = root / "images" / task
        images.mkdir(parents=True)
        records: list[dict[str, Any]] = []
        questions: list[dict[str, Any]] = []
        for number in range(train + test):
            word, colour = list(answers.items())[number % len(answers)]
            shade = tuple(max(0, min(255, value + number - 15)) for value in colour)
            path = f"{task}/{number}.png"
            Image.new("RGB", (12 + number % 5, 12), shade).save(root / "images" / path)
            text = f"What {noun} is this ?" if number % 2 else f"Which {noun} is this ? Answer with one word ."
            if number < train:
                turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": word}]
                records.append({"id": f"{task}-{number}", "image": path, "conversations": turns})
            else:
                questions.append({"question_id": f"{task}-{number}", "image": path, "text": text, "answer": word})
        folder = root / task
        folder.mkdir()
        (folder / "train.json").write_text(json.dumps(records))
        (folder / "test.json").write_text(json.dumps(questions))
    return root


def run_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of a run file over a tiny model and stream below `folder`, both built if missing."""
    if not (folder / "model").exists():
        build_model(folder / "model")
        build_data(folder / "data")
    tasks = [
        {
            "name": name,
            "train": f"{name}/train.json",
            "test": f"{name}/test.json",
            "images": "images",
            "scorer": "exact",
        }
        for name in ("Colour", "Tone")
    ]
    content: dict[str, Any] = {
        "name": "tiny",
        "benchmark": {"name": "tiny", "tasks": tasks},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "method": {"name": "keeplora"},
        "data_root": str(folder / "data"),
        "lora": {"rank": 4, "alpha": 8},
        "training": {
            "epochs": 1,
            "learning_rate": 5e-3,
            "projector_learning_rate": 1e-4,
            "global_batch": 8,
            "micro_batch": 2,
            "max_length": 128,
        },
        "measurement": {"ratio": 0.5, "batch_size": 4},
        "evaluation": {"batch_size": 4, "max_new_tokens": 3},
        "distributed": {"ranks": 1},
    }
    return {**content, **changes}
