"""Train the CLIP of the class-set stream on pre-training pictures and captions; write it with its tokenizer.

Usage: python playground/prepare/pretrain_clip.py --cache DIR --start playground/vit --out playground/clip --steps N
The vision tower starts from the ViT of pretrain_vit.py. Pictures of a batch that have the same caption count as one
another's match. Writes a CLIPModel in float16, and its tokenizer: lower-case words, pad 0, bos 1, unk 2, eos 3.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTModel

import base_model
import build_classes
import cached_pictures
import captions
import check_vision
from half_precision import MasterWeights
from pretrain_tower import learning_rate
from pretrain_vit import vit_config

SEED = 13
LENGTH = 24
KINDS = (*cached_pictures.KINDS, "emblem")
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
# how often a picture is drawn, where not once per epoch
OFTEN = {"molecule": 0.3, "flag": 0.5, "scene": 0.5, "map": 1.5, "emblem": 2.0}
PREPROCESSOR = base_model.PREPROCESSOR | {
    "size": {"shortest_edge": check_vision.SIDE},
    "crop_size": {"height": check_vision.SIDE, "width": check_vision.SIDE},
}


def build_tokenizer(facts: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """A token for every word of the captions, the sets' class names and templates, and some general words."""
    rng = np.random.default_rng(SEED)
    texts = {captions.caption(known, named, rng) for known in facts for named in (True, False)}
    texts |= {*check_vision.TEMPLATES.values(), captions.GENERAL}
    texts |= {name.replace("_", " ") for chosen in build_classes.SETS for name in chosen.classes}
    words = sorted({word for text in texts for word in re.findall(r"[\w-]+", text)})
    vocabulary = {token: k for k, token in enumerate([*SPECIAL, *".,?:'", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="right",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def clip_config(words: int) -> CLIPConfig:
    """A vision tower of the ViT's size and a text tower for ``words`` tokens."""
    sizes = vit_config()
    vision = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "projection_dim": 96,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": words,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_dim": 96,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)


@torch.no_grad()
def start_tower(model: CLIPModel, vit: ViTModel) -> None:
    """Copy the ViT into the vision tower; its other pixel scale and its patch bias go into weights and positions."""
    tower, source = model.vision_model, vit.embeddings
    patch = source.patch_embeddings.projection
    (mean, std), (old_mean, old_std) = (
        [torch.tensor(values).view(1, 3, 1, 1) for values in normal]
        for normal in ((cached_pictures.MEAN, cached_pictures.STD), check_vision.VIT_NORMAL)
    )
    tower.embeddings.patch_embedding.weight.copy_(patch.weight * std / old_std)
    moved = patch.bias + (patch.weight * (mean - old_mean) / old_std).sum((1, 2, 3))
    positions = source.position_embeddings[0].clone()
    positions[1:] += moved
    tower.embeddings.position_embedding.weight.copy_(positions)
    tower.embeddings.class_embedding.copy_(source.cls_token[0, 0])
    tower.pre_layrnorm.weight.fill_(positions.std(1).mean())
    tower.post_layernorm.load_state_dict(vit.layernorm.state_dict())
    names = {"o_proj": "out_proj", "attention": "self_attn", "layernorm_before": "layer_norm1"}
    names |= {"layernorm_after": "layer_norm2"}
    for new, old in zip(tower.encoder.layers, vit.layers, strict=True):
        state = {".".join(names.get(part, part) for part in key.split(".")): v for key, v in old.state_dict().items()}
        new.load_state_dict(state)


def contrast(model: CLIPModel, images: torch.Tensor, texts: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Contrastive loss of images ``[n, d]`` and different texts ``[m, d]``, ``match`` ``[n]`` giving each its text."""
    logits = model.logit_scale.float().exp().clamp(max=100) * images @ texts.T
    shared = torch.nn.functional.one_hot(match, len(texts)).float()
    backward = (shared / shared.sum(0) * -logits.log_softmax(0)).sum() / len(texts)
    return (torch.nn.functional.cross_entropy(logits, match) + backward) / 2


def save(model: CLIPModel, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write float16 weights, configuration, tokenizer and image-processor fields."""
    written = CLIPModel(model.config)
    written.load_state_dict(weights)
    written.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--data", type=Path, help="measure the model on the sets' val pictures every 200 steps")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    generator, rng = torch.Generator().manual_seed(SEED), np.random.default_rng(SEED)
    data = cached_pictures.load(options.cache, "pretrain", KINDS, check_vision.SIDE)
    named = rng.random(len(data.facts)) < [captions.NAMED.get(known["kind"], 0.0) for known in data.facts]
    share_of = torch.tensor([OFTEN.get(known["kind"], 1.0) for known in data.facts])
    tokenizer = build_tokenizer(data.facts)
    model = CLIPModel._from_config(clip_config(len(tokenizer)), attn_implementation="eager")
    start_tower(model, ViTModel.from_pretrained(options.start, add_pooling_layer=False, dtype=torch.float32))
    masters = MasterWeights(model, options.lr, weight_decay=0.05)
    print(f"{len(data.facts)} pictures, {int(named.sum())} may be named, {len(tokenizer)} words", flush=True)
    began, running = time.time(), 0.0
    for step in range(options.steps):
        rows = torch.multinomial(share_of, options.batch, replacement=True, generator=generator).numpy()
        wording = [captions.caption(data.facts[k], bool(named[k]), rng) for k in rows]
        different = sorted(set(wording))
        match = torch.tensor([different.index(text) for text in wording])
        ids = tokenizer(different, padding=True, return_tensors="pt")
        batch = cached_pictures.pixels(data.images[rows], generator, 3)
        out = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=batch.bfloat16())
        loss = contrast(model, out.image_embeds.float(), out.text_embeds.float(), match)
        loss.backward()
        masters.step(learning_rate(step, options.steps, options.lr))
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {running / 100:.3f} {time.time() - began:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % 200 == 0 or step + 1 == options.steps:
            save(model, masters.state_dict(), tokenizer, options.out)
            if options.data:
                model.eval()
                print(check_vision.check_clip(model, tokenizer, options.data, "val"), flush=True)
                model.train()


if __name__ == "__main__":
    main()
