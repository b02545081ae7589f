"""Stage B: train the whole tiny LLaVA on general questions, starting from stage A's tower.

Usage: python playground/prepare/pretrain_llava.py --cache DIR --model playground/model --steps N

A sequence is one picture and several questions about it. The questions are branches: each sees the picture and itself,
never another branch, and counts its positions from the end of the picture, so that every question is learned exactly as
if it stood alone while the picture is computed once. Rows without a picture hold text-only questions in the same way.
Writes DIR/llava.safetensors (float32) every 250 steps; ``--export`` writes a checkpoint of it into the model folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

import base_model
import cached_pictures
import general_questions
from build_tokenizer import words
from half_precision import MasterWeights
from llava_cl.data import encode_conversation
from pretrain_tower import learning_rate

SEED = 11
BRANCHES = 5
TEXT_ROWS = 3
HELD_OUT = 1500
IGNORE = -100


class Branches:
    """Questions encoded as (shared prefix, branches), with a cache of the encodings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._image = tokenizer.convert_tokens_to_ids("<image>")
        self._cache: dict[tuple[str, str, bool], tuple[list[int], list[int], list[int]]] = {}

    def encode(self, question: str, answer: str, image: bool) -> tuple[list[int], list[int], list[int]]:
        """(ids of the prefix up to the end of the picture, ids of the rest, labels of the rest)."""
        key = (question, answer, image)
        if key not in self._cache:
            text = f"<image>\n{question}" if image else question
            encoded = encode_conversation(
                [{"from": "human", "value": text}, {"from": "gpt", "value": answer}],
                self._tokenizer,
                image_token_id=self._image,
                num_image_tokens=base_model.IMAGE_TOKENS,
                max_length=2048,
                has_image=image,
            )
            ids, labels = encoded["input_ids"], encoded["labels"]
            if encoded["unmatched"] or 0 in ids:
                raise ValueError(f"question outside the vocabulary: {question!r} {answer!r}")
            cut = len(ids) - ids[::-1].index(self._image) if image else 4
            if len(self._cache) > 200000:
                self._cache.clear()
            self._cache[key] = ids[:cut], ids[cut:], labels[cut:]
        return self._cache[key]


def batch_rows(rows: list[list[tuple[list[int], list[int], list[int]]]]) -> dict[str, torch.Tensor]:
    """Pad rows of branches to one batch: ids, labels, positions ``[n, l]`` and the additive mask ``[n, 1, l, l]``."""
    lengths = [len(row[0][0]) + sum(len(b[1]) for b in row) for row in rows]
    size = (len(rows), max(lengths))
    ids, labels = torch.zeros(size, dtype=torch.long), torch.full(size, IGNORE)
    positions, branch = torch.zeros(size, dtype=torch.long), torch.full(size, -1)
    for r, row in enumerate(rows):
        prefix = row[0][0]
        at = len(prefix)
        ids[r, :at], positions[r, :at], branch[r, :at] = torch.tensor(prefix), torch.arange(at), 0
        for k, (_, tail, answer) in enumerate(row):
            part = slice(at, at + len(tail))
            ids[r, part], labels[r, part] = torch.tensor(tail), torch.tensor(answer)
            positions[r, part] = len(prefix) + torch.arange(len(tail))
            branch[r, part] = k + 1
            at += len(tail)
    causal = torch.ones(size[1], size[1], dtype=torch.bool).tril()
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    allowed = causal & same & (branch[:, None, :] >= 0)
    allowed |= torch.eye(size[1], dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)[:, None]
    return {"ids": ids, "labels": labels, "positions": positions, "mask": mask.bfloat16()}


def answer_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor], images: torch.Tensor, image_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens, and whether each of them is the model's first choice ``[answers]``."""
    inner = model.model
    embedded = inner.language_model.embed_tokens(batch["ids"])
    features = inner.vision_tower(pixel_values=images, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = inner.multi_modal_projector(features)
    embedded = embedded.masked_scatter((batch["ids"] == image_id)[..., None], projected)
    hidden = inner.language_model(
        inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    known = batch["labels"] != IGNORE
    before = known.roll(-1, 1)
    before[:, -1] = False
    logits = model.lm_head(hidden[before]).float()
    truth = batch["labels"][known]
    return torch.nn.functional.cross_entropy(logits, truth), logits.argmax(1) == truth


class Questions:
    """Draws the rows of a batch."""

    def __init__(
        self, facts: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
    ) -> None:
        self._facts, self._rng = facts, rng
        self._branches = Branches(tokenizer)
        self._words = [w for w in words() if w not in ("USER", "ASSISTANT")]

    def about(self, picture: int) -> list[tuple[list[int], list[int], list[int]]]:
        """A row of at most ``BRANCHES`` questions about one picture."""
        asked = general_questions.about(self._facts[picture], self._rng)
        chosen = self._rng.permutation(len(asked))[:BRANCHES]
        return [self._branches.encode(*asked[int(k)], image=True) for k in chosen]

    def text_only(self) -> list[tuple[list[int], list[int], list[int]]]:
        """A row of text-only questions."""
        asked = [general_questions.text_only(self._words, self._rng) for _ in range(BRANCHES)]
        return [self._branches.encode(*a, image=False) for a in asked]


def scores(
    model: LlavaForConditionalGeneration,
    facts: list[dict[str, str]],
    images: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    image_id: int,
) -> dict[str, float]:
    """Share of right answer tokens per picture kind, over held-out pictures with a fixed choice of questions."""
    model.eval()
    questions = Questions(facts, tokenizer, np.random.default_rng(5))
    kinds = [f["kind"] for f in facts]
    result = {}
    with torch.no_grad():
        for kind in sorted(set(kinds)):
            of_kind = [k for k, name in enumerate(kinds) if name == kind][:40]
            batch = batch_rows([questions.about(k) for k in of_kind])
            pixels = cached_pictures.pixels(images[of_kind]).bfloat16()
            result[kind] = round(answer_loss(model, batch, pixels, image_id)[1].float().mean().item(), 3)
    model.train()
    return result


def train(options: argparse.Namespace) -> None:
    """Train and checkpoint."""
    tokenizer = base_model.load_tokenizer(options.model)
    model = base_model.build(tokenizer, SEED, attention="eager")
    image_id = model.config.image_token_id
    tower = load_file(options.tower)
    missing, unexpected = model.model.vision_tower.load_state_dict(tower, strict=False)
    if unexpected or any("position_ids" not in m for m in missing):
        raise ValueError(f"stage A's tower does not fit: {missing} {unexpected}")
    if options.start:
        kept = {k: v for k, v in load_file(options.start).items() if "vision_tower" not in k}
        model.load_state_dict(kept, strict=False)
    data = cached_pictures.load(options.cache, "pretrain")
    generator = torch.Generator().manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(data.facts))
    held, rows = order[:HELD_OUT], order[HELD_OUT:]
    held_images, held_facts = data.images[held], [data.facts[int(k)] for k in held]
    questions = Questions(data.facts, tokenizer, rng)
    if options.freeze_tower:
        model.model.vision_tower.bfloat16().requires_grad_(False)
    masters = MasterWeights(model, options.lr, weight_decay=0.02)
    began, running, right = time.time(), 0.0, 0.0
    for step in range(options.steps):
        lr = learning_rate(step, options.steps, options.lr)
        chosen = rows[rng.integers(len(rows), size=options.batch)]
        batch = batch_rows(
            [questions.about(int(k)) for k in chosen] + [questions.text_only() for _ in range(TEXT_ROWS)]
        )
        pixels = cached_pictures.pixels(data.images[chosen], generator).bfloat16()
        loss, correct = answer_loss(model, batch, pixels, image_id)
        loss.backward()
        masters.step(lr)
        running, right = running + loss.item(), right + correct.float().mean().item()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1} loss {running / 50:.3f} right {right / 50:.3f} {time.time() - began:.0f} s",
                flush=True,
            )
            running = right = 0.0
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            weights = {
                k: v.float() for k, v in model.state_dict().items() if k != "lm_head.weight"
            } | masters.state_dict()
            save_file(weights, options.cache / "llava.safetensors")
            print(scores(model, held_facts, held_images, tokenizer, image_id), flush=True)


def export(options: argparse.Namespace) -> None:
    """Write the last checkpoint into the model folder."""
    tokenizer = base_model.load_tokenizer(options.model)
    model = base_model.build(tokenizer, SEED)
    weights = load_file(options.cache / "llava.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(m != "lm_head.weight" and "position_ids" not in m for m in missing):
        raise ValueError(f"the checkpoint does not fit: {missing} {unexpected}")
    model.tie_weights()
    base_model.save(model, options.model)


def main() -> None:
    """Train, or export a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--tower", type=Path, help="stage A's tower")
    parser.add_argument("--start", type=Path, help="continue with the language model and projector of this checkpoint")
    parser.add_argument("--freeze-tower", action="store_true", help="train the projector and language model only")
    parser.add_argument("--export", action="store_true")
    options = parser.parse_args()
    if options.export:
        export(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
