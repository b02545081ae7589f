"""Every build of the LLaMA vocabulary encodes pieces exactly as SentencePiece does."""

import pickle
import random

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from llava_cl.data.chat import chat_format
from llava_cl.data.tokenization import TextEncoder

FRAGMENTS = [
    "the", "word", " ", "  ", "     ", "\n", "\t", "\r\n", "é", "e\u0301", "ไหน", "日本", "😀", "12.5", "'s", "Привет",
    "\u2581", ":", "ASSISTANT", "a" * 7, "=" * 9, "//", "İ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "ﬁ",
]  # fmt: skip


@pytest.fixture(scope="session")
def sentencepiece_model(vocabulary):
    return sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "tokenizer.model"))


def test_pieces_are_those_of_sentencepiece(any_llama, sentencepiece_model):
    encoder = TextEncoder(any_llama, "<image>", -200)
    random_numbers = random.Random(0)
    for _ in range(1500):
        text = "".join(random_numbers.choices(FRAGMENTS, k=random_numbers.randint(1, 12)))
        assert encoder(text) == sentencepiece_model.encode(text), repr(text)


def test_special_tokens_split_the_text(any_llama, sentencepiece_model):
    encode = sentencepiece_model.encode
    encoder = TextEncoder(any_llama, "<image>", -200)
    assert encoder(" a <s> b</s></s>\n<unk>") == [*encode(" a "), 1, *encode(" b"), 2, 2, *encode("\n"), 0]
    assert encoder("") == []


def test_other_added_tokens_are_recognised(vocabulary, sentencepiece_model):
    tokenizer = LlamaTokenizer.from_pretrained(vocabulary)
    tokenizer.add_tokens(["<box>", "<box>2"])
    encoder = TextEncoder(tokenizer, "<image>", -200)
    assert encoder("a<box>2b<box>") == [
        *sentencepiece_model.encode("a"),
        32001,
        *sentencepiece_model.encode("b"),
        32000,
    ]


def test_image_token_of_another_name_cannot_come_from_text(vocabulary):
    tokenizer = LlamaTokenizer.from_pretrained(vocabulary)
    tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    assert 32000 not in TextEncoder(tokenizer, "<image>", 32000)("see <im_patch> here")


@pytest.mark.parametrize("name", ["vicuna_v1", "smolvlm"])
def test_formats_are_the_same_in_a_process_that_was_started_afresh(any_llama, name):
    """Such a process, which reads data, gets what it needs as a pickle."""
    chat = chat_format(name, any_llama, -200, 2)
    copy = pickle.loads(pickle.dumps(chat))
    turns = [{"from": "human", "value": "<image>\nWhat  is this ?"}, {"from": "gpt", "value": "Éte 😀"}]
    options = {"max_length": 99, "images_per_turn": 1}
    assert copy.conversation(turns, **options) == chat.conversation(turns, **options)
    assert copy.prompt("What <image> now", images=1) == chat.prompt("What <image> now", images=1)


def test_a_format_of_a_tokenizer_without_pieces_as_well(word_level):
    chat = chat_format("smolvlm", word_level, -200, 2)
    assert pickle.loads(pickle.dumps(chat)).prompt("What", images=1) == chat.prompt("What", images=1)
