"""The layout in which LLaVA-1.5's authors publish checkpoints: one decoder folder, and a vision tower beside it.

The folder's `config.json` is a LLaMA configuration with `mm_*` keys; its weights are the decoder's and the
projector's (`model.layers.*`, `model.mm_projector.*`), in safetensors or `.bin` files. The CLIP tower is a checkpoint
of its own, named by `mm_vision_tower`. The text after `<image>` is split off before tokenisation, so its vocabulary
has no image token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerBase

from llava_cl.errors import InputError
from llava_cl.store import read_json

TOWER = "mm_vision_tower"
IMAGE_TOKEN = "<image>"
_TOWER_PREFIX = "model.vision_tower."
_PREFIXES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.", _TOWER_PREFIX),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
)
"""Prefixes of the original's keys and of transformers' names; `lm_head` has one name in both."""
KEY_MAPPING = {f"^{re.escape(old)}": new for old, new in _PREFIXES}
"""Patterns of the original's keys -> transformers' names, in the form of `from_pretrained`."""

_EXPECTED = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "image_aspect_ratio": "pad"}
_FEATURES = {"patch": "default", "cls_patch": "full"}
_UNUSED_BYTE = "<0x00>"


def architecture(
    content: Mapping[str, Any], file: Path, tower: Path, tokenizer: PreTrainedTokenizerBase
) -> LlavaConfig:
    """The transformers configuration of an original one.

    Args:
        content: the content of `file`, an original `config.json`.
        file: named in errors.
        tower: folder of the vision tower.
        tokenizer: the checkpoint's tokenizer, for the id that stands for images.

    Raises:
        InputError: a kind of LLaVA that is not LLaVA-1.5.
    """
    problems = [
        f"{file}: {key} is {content[key]!r}, only LLaVA-1.5's {wanted!r} is supported."
        for key, wanted in _EXPECTED.items()
        if key in content and content[key] != wanted
    ]
    select = content.get("mm_vision_select_feature", "patch")
    if select not in _FEATURES:
        problems.append(f"{file}: mm_vision_select_feature is {select!r}, expected one of {', '.join(_FEATURES)}.")
    if problems:
        raise InputError(*problems)
    strategy: Any = _FEATURES[select]
    text = {key: value for key, value in content.items() if not key.startswith("mm_") and key != "architectures"}
    return LlavaConfig(
        text_config=LlamaConfig.from_dict({**text, "model_type": "llama"}),
        vision_config=_vision_config(tower),
        image_token_index=_image_token_id(tokenizer, content["vocab_size"], file),
        projector_hidden_act="gelu",
        vision_feature_layer=content.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=content.get("tie_word_embeddings", False),
    )


def find_tower(content: Mapping[str, Any], folder: Path, configured: Path | None) -> Path:
    """The folder of the vision tower: the configured one, or the one that the checkpoint names, at hand or beside it.

    Raises:
        InputError: none of the places has it.
    """
    named = Path(str(content[TOWER]))
    places = [configured] if configured else [folder / named, folder.parent / named, folder.parent / named.name]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder / 'config.json'}: the vision tower {named} is in none of {', '.join(map(str, places))}; "
        "put it there, or name its folder with model.vision_tower."
    )


def _vision_config(tower: Path) -> CLIPVisionConfig:
    content = read_json(tower / "config.json")
    if content.get("model_type") == "clip":
        whole: Any = CLIPConfig.from_pretrained(tower, local_files_only=True)
        config: CLIPVisionConfig = whole.vision_config
        return config
    if content.get("model_type") == "clip_vision_model":
        return CLIPVisionConfig.from_pretrained(tower, local_files_only=True)
    raise InputError(
        f"{tower / 'config.json'}: model_type is {content.get('model_type')!r}, expected a CLIP checkpoint."
    )


def _image_token_id(tokenizer: PreTrainedTokenizerBase, rows: int, file: Path) -> int:
    """An id that stands for images: one without a word of its own, so that every row keeps its meaning.

    The embedding of this id is never read, and its logit is what it was.
    """
    ids = tokenizer.get_vocab()
    if ids.get(IMAGE_TOKEN, rows) < rows:
        return ids[IMAGE_TOKEN]
    if len(tokenizer) < rows:
        return len(tokenizer)
    if _UNUSED_BYTE not in ids:
        raise InputError(f"{file}: the vocabulary has neither a free row nor {_UNUSED_BYTE} to stand for images.")
    return ids[_UNUSED_BYTE]


def original_config(config: LlavaConfig, tower: str) -> dict[str, Any]:
    """An original `config.json` for a transformers configuration."""
    features = {value: key for key, value in _FEATURES.items()}
    text: Any = config.text_config
    vision: Any = config.vision_config
    own = {key: value for key, value in text.to_dict().items() if key not in {"dtype", "transformers_version"}}
    return {
        **own,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "tie_word_embeddings": config.tie_word_embeddings,
        TOWER: tower,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        **_EXPECTED,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }


def original_key(name: str) -> str | None:
    """The original's key of a parameter of transformers' model; None for the tower's, which are stored apart."""
    if name.startswith(_TOWER_PREFIX):
        return None
    for old, new in _PREFIXES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name
