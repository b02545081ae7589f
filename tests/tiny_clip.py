"""A CLIP of a few thousand parameters that reads the colours of `tiny_vit`, and a stream of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import tiny_vit

SPECIAL = ["<pad>", "<start>", "<unk>", "<end>"]
WORDS = [*SPECIAL, "a", "photo", "of", ".", *tiny_vit.COLOURS]
LENGTH = 10


def build_model(folder: Path, *, seed: int = 0) -> Path:
    """Writes a random CLIP with its tokenizer in the layout of transformers; returns the folder."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(WORDS),
            "max_position_embeddings": LENGTH,
            "bos_token_id": 1,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<start>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def run_content(folder: Path, method: str = "keeplora", **model: Any) -> dict[str, Any]:
    """The content of a run file for a stream of three tasks of two colours; builds what it needs below `folder`."""
    content = tiny_vit.run_content(folder, method)
    if not (folder / "clip").exists():
        build_model(folder / "clip")
    content["name"] = "tiny_clip"
    content["model"] = {"family": "clip", "path": str(folder / "clip"), "dtype": "float32", **model}
    content["benchmark"]["evaluate"] = "all"
    content["training"]["scheduler"] = "one_cycle"
    del content["training"]["milestones"]
    return content
