"""One tiny LLaVA with a LLaMA vocabulary, written in both layouts without the package's own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
VOCABULARY = 32000
TOWER = "clip-vit-tiny"
PROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "legacy": True,
    "model_max_length": 2048,
}


def plain_model(image_token_id: int, *, rows: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of transformers' own class; the same weights every time, rows apart."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": rows}),
        image_token_index=image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            shape = (VOCABULARY, *parameter.shape[1:]) if parameter.shape[0] == rows else parameter.shape
            values = torch.randn(shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.5)
            parameter[: shape[0]] = values
            # Not `model.to(dtype)`, which would round the rotary frequencies too.
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def write_transformers(folder: Path, *, published: bool = True, **changes: Any) -> Path:
    """The model in transformers' layout, its image token in row 32000 as in the published conversion.

    `published` writes the keys of that conversion, otherwise transformers itself writes its present ones.
    """
    model = plain_model(VOCABULARY, rows=VOCABULARY + 64, **changes)
    model.save_pretrained(folder, max_shard_size="1MB")
    if published:
        decoder, tower = original_tensors(model)
        for file in folder.glob("model*"):
            file.unlink()
        tensors = {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
        for name, tensor in decoder.items():
            key = f"language_model.{name}"
            for number, linear in ((0, 1), (2, 2)):
                key = key.replace(
                    f"language_model.model.mm_projector.{number}", f"multi_modal_projector.linear_{linear}"
                )
            tensors[key] = tensor
        _save(folder / "model.safetensors", tensors)
    shutil.copyfile(SENTENCEPIECE, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def original_tensors(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Decoder and projector under the original's keys, and the tower under CLIP's."""
    decoder, tower = {}, {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["model", "vision_tower"]:
            inside = parts[2:] if parts[2] == "vision_model" else ["vision_model", *parts[2:]]
            tower[".".join(inside)] = parameter.detach()
        elif parts[:2] == ["model", "multi_modal_projector"]:
            number = {"linear_1": 0, "linear_2": 2}[parts[2]]
            decoder[f"model.mm_projector.{number}.{parts[3]}"] = parameter.detach()
        elif parts[:2] == ["model", "language_model"]:
            decoder[".".join(["model", *parts[2:]])] = parameter.detach()
        else:
            decoder[name] = parameter.detach()
    return decoder, tower


def write_original(
    folder: Path, *, binary: bool = True, shards: int = 2, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """The same model in its authors' layout; returns the decoder's folder, the tower lies beside it."""
    decoder, tower = original_tensors(plain_model(3, dtype=dtype))
    checkpoint, vision = folder / "llava", folder / TOWER
    checkpoint.mkdir(parents=True)
    vision.mkdir()
    names = sorted(decoder)
    suffix = "bin" if binary else "safetensors"
    stem = "pytorch_model" if binary else "model"
    files = [
        f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}" for i in range(shards)
    ]
    for number, file in enumerate(files):
        _save(checkpoint / file, {name: decoder[name] for name in names[number::shards]})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (checkpoint / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if binary:
        # As published: the projector once more, by itself.
        _save(checkpoint / "mm_projector.bin", {key: value for key, value in decoder.items() if "mm_projector" in key})
    content = {
        **TEXT,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_act": "silu",
        "mm_vision_tower": f"openai/{TOWER}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 16,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **config,
    }
    (checkpoint / "config.json").write_text(json.dumps(content))
    shutil.copyfile(SENTENCEPIECE, checkpoint / "tokenizer.model")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    # The tower is published as a whole CLIP, with its text side.
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 8), "logit_scale": torch.tensor(1.0)}
    _save(vision / f"{stem if shards == 1 or binary else 'model'}.{suffix}", {**tower, **text})
    clip_text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    clip = {"model_type": "clip", "vision_config": VISION, "text_config": {**clip_text, "vocab_size": 4}}
    (vision / "config.json").write_text(json.dumps(clip))
    (vision / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return checkpoint


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if file.suffix == ".bin":
        torch.save(whole, file)
    else:
        save_file(whole, file, metadata={"format": "pt"})
