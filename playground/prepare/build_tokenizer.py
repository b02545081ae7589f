"""Build the word-level tokenizer that behaves as LLaMA's does, from the wording of the base and of both streams.

Usage: python playground/prepare/build_tokenizer.py --out playground/model

Like LLaMA's: unk 0, bos 1 in front, eos 2; a space is written as U+2581, every piece of text encoded by itself gets one
in front, and a trailing space is a token of its own. The system prompt and the
fixed instruction sentences are one token each, so that a question costs few.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import general_questions
import tasks_domain
import tasks_general
from wording import LETTER, NUMBER, WORD, YES_NO

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SENTENCES = (SYSTEM, WORD, LETTER, NUMBER, YES_NO)
SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
MARKS = (".", ",", "?", ":", ")", "'", "\n", SPACE)


def words() -> list[str]:
    """Every word (and digit, and letter) that any question or answer uses, sorted."""
    texts = [*general_questions.texts(), NUMBER, "USER ASSISTANT"]
    for task in (*tasks_general.TASKS, *tasks_domain.TASKS):
        texts += [*task.wording]
        if task.name == "Fashion":
            texts.append("Which piece of clothing is shown?")
    return sorted(set(re.findall(r"[\w-]+", " ".join(texts).replace("'s", " s "))))


def build() -> Tokenizer:
    """The tokenizer: WordLevel over words with their leading space, punctuation and newlines by themselves."""
    vocabulary = {token: k for k, token in enumerate([*SPECIAL, *MARKS])}
    for word in words():
        vocabulary.setdefault(SPACE + word, len(vocabulary))
    for word in ("s",):  # what follows the apostrophe of "option's" has no space in front
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", "\n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(rf"{SPACE}?[\w-]+|\n|{SPACE}|[^\w\s]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in SENTENCES])
    return tokenizer


def main() -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=build(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
    )
    wrapped.save_pretrained(out)
    print(json.dumps({"vocabulary": len(wrapped)}))


if __name__ == "__main__":
    main()
