"""Writing a LLaVA model down in the layout of transformers or in that of its authors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from tokenizers import AddedToken
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_cl.models import llava_original as original
from llava_cl.models.contract import ImageSpec
from llava_cl.store import read_json

_SHARD = "5GB"
_PROCESSOR = "preprocessor_config.json"
_SENTENCEPIECE = "tokenizer.model"
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"})
_PUBLISHED = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
)
# LLaVA-1.5's conversation: the system text, and images in front of the text of their turn.
_CHAT_TEMPLATE = """\
{{ "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. " }}\
{% for message in messages %}\
{% if message.content is string %}{% set text = message.content %}{% set images = 0 %}{% else %}\
{% set text = message.content | selectattr("type", "equalto", "text") | map(attribute="text") | join("") %}\
{% set images = message.content | selectattr("type", "equalto", "image") | list | length %}{% endif %}\
{% if message.role == "user" %}\
{{ "USER: " + "<image>\\n" * images + text + " " }}{% else %}{{ "ASSISTANT: " + text + "</s>" }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ "ASSISTANT:" }}{% endif %}"""
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def save_transformers(
    model: PreTrainedModel, folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, images: ImageSpec
) -> None:
    """Writes a folder that `LlavaForConditionalGeneration.from_pretrained` and `LlavaProcessor` read.

    A vocabulary without an image token gets one, with a row of zeros where it has no row to spare. The image
    processor pads to a square as in training, which not every published processor of LLaVA-1.5 does.

    Args:
        model: a `LlavaForConditionalGeneration`; its embeddings may be enlarged in place.
        folder: an existing folder.
        base: the checkpoint whose tokenizer files are kept.
        tokenizer: the checkpoint's tokenizer.
        images: preprocessing of images.
    """
    config: Any = model.config
    for file in _files(base, *_TOKENIZER_FILES):
        shutil.copyfile(file, folder / file.name)
    if original.IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(original.IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.save_pretrained(folder)
        image_token_id = len(tokenizer) - 1
        if image_token_id >= config.text_config.vocab_size:
            _append_zero_row(model)
            # A logit of zero could otherwise win.
            model.generation_config.suppress_tokens = [image_token_id]
        config.image_token_index = image_token_id
    keys = _transformers_keys(model, base)
    tensors = {keys[name]: parameter.detach() for name, parameter in model.named_parameters()}
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD, metadata={"format": "pt"})
    config.save_pretrained(folder)
    _consistent(model.generation_config).save_pretrained(folder)
    vision = config.vision_config
    padding = {"image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_pad": True}
    _write(folder / _PROCESSOR, {**_clip_processor(images), **padding})
    if not list(folder.glob("chat_template*")):
        (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": original.IMAGE_TOKEN,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            # The class token, which the strategy "default" takes off again.
            "num_additional_image_tokens": 1,
        },
    )


def _consistent(settings: GenerationConfig) -> GenerationConfig:
    """The settings; where they say greedy decoding, without those of sampling, which are refused beside it."""
    content = settings.to_diff_dict()
    if not settings.do_sample:
        content = {key: value for key, value in content.items() if key not in _SAMPLING}
    return GenerationConfig.from_dict(content)


def save_original(model: PreTrainedModel, folder: Path, base: Path, images: ImageSpec, *, tower_apart: bool) -> None:
    """Writes a folder in the layout of LLaVA's authors.

    The vision tower, which no stage trains, is referred to as `base` does, or written to `vision_tower/` where `base`
    holds it itself; LLaVA's own code takes the absolute path of that folder as `mm_vision_tower`. Rows that
    `save_transformers` added to the vocabulary are left out again.

    Args:
        model: a `LlavaForConditionalGeneration`.
        folder: an existing folder.
        base: the checkpoint that the model was loaded from, for its tokenizer and its tower.
        images: preprocessing of images.
        tower_apart: `base` names a tower and does not hold it.
    """
    config: Any = model.config
    tensors = {}
    for name, parameter in model.named_parameters():
        key = original.original_key(name)
        if key is not None:
            tensors[key] = parameter.detach()
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows = tensors[names[0]].shape[0]
    sentences = base / _SENTENCEPIECE
    if sentences.is_file():
        shutil.copyfile(sentences, folder / _SENTENCEPIECE)
        _write(folder / "tokenizer_config.json", _llama_tokenizer(base))
        vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(sentences)).vocab_size()
        if not tensors[names[0]][vocabulary:].any():
            rows = vocabulary
    else:
        for file in _files(base, *_TOKENIZER_FILES):
            shutil.copyfile(file, folder / file.name)
    for name in names:
        if name in tensors:
            tensors[name] = tensors[name][:rows].clone()
    content = read_json(base / "config.json")
    if original.TOWER not in content:
        content = original.original_config(config, "")
    if not tower_apart:
        tower = folder / "vision_tower"
        model.model.vision_tower.save_pretrained(tower)
        _write(tower / _PROCESSOR, _clip_processor(images))
        content[original.TOWER] = tower.name
    dtype = str(model.dtype).removeprefix("torch.")
    _write(folder / "config.json", {**content, "vocab_size": rows, "torch_dtype": dtype})
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD, metadata={"format": "pt"})


def _transformers_keys(model: PreTrainedModel, base: Path) -> dict[str, str]:
    """Parameter name -> key on disk: the base's own keys, or those of the published LLaVA-1.5, which all versions read.

    `save_pretrained` writes keys that depend on the version and on how the model was loaded.
    """
    own = {}
    if original.TOWER not in read_json(base / "config.json"):
        own = {_canonical(key): key for file in base.glob("*.safetensors") for key in _keys(file)}
    keys = {}
    for name, _ in model.named_parameters():
        key = name
        for prefix, published in _PUBLISHED:
            if key.startswith(prefix):
                key = published + key.removeprefix(prefix)
                break
        keys[name] = own.get(_canonical(key), key)
    return keys


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stream:
        return list(stream.keys())


def _canonical(key: str) -> str:
    """The same for every spelling that transformers has used for a parameter."""
    parts = [part for part in key.split(".") if part not in {"model", "vision_model"}]
    return ".".join(parts[1:] if parts[-2] == "lm_head" and parts[0] == "language_model" else parts)


def _clip_processor(images: ImageSpec) -> dict[str, Any]:
    """`preprocessor_config.json` of CLIP's image processor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": images.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": images.size, "width": images.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
        "do_convert_rgb": True,
    }


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _append_zero_row(model: PreTrainedModel) -> None:
    rows = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert isinstance(module, nn.Embedding | nn.Linear)
            module.weight[rows:] = 0


def _llama_tokenizer(base: Path) -> dict[str, Any]:
    """`tokenizer_config.json` of a LLaMA tokenizer as LLaVA-1.5 uses it, from that of any layout."""
    file = base / "tokenizer_config.json"
    own = read_json(file) if file.is_file() else {}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": own.get("legacy", True),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
