"""The playground's tiny LLaVA: its configuration, and writing it in the transformers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from pretrain_tower import tower_config

IMAGE_TOKENS = 36
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 72},
    "crop_size": {"height": 72, "width": 72},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def build(tokenizer: PreTrainedTokenizerBase, seed: int, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A freshly drawn float32 model for ``tokenizer``."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    config = LlavaConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=image,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write bfloat16 weights, configuration and image-processor fields beside the tokenizer in ``folder``."""
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, 2
    model.generation_config.pad_token_id = 0
    model.bfloat16().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that build_tokenizer.py wrote."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
