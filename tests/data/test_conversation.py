"""Ids and labels against LLaVA's own preprocessing, in every build of the tokenizer, and by hand in a tiny one."""

import copy
import json
from pathlib import Path

import pytest
from data_vocabulary import SYSTEM_ID, WORD_ID
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.data import encode_conversation, encode_prompt
from llava_cl.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "conversations"
SAMPLES = [json.loads(line) for line in (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
IMAGE = -200


def encode(tokenizer, turns, *, image=True, copies=1, max_length=2048, image_id=IMAGE):
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return encode_conversation(
        conversation,
        tokenizer,
        image_token_id=image_id,
        num_image_tokens=copies,
        max_length=max_length,
        has_image=image,
    )


def answers(encoded):
    return [label for label in encoded["labels"] if label != -100]


def test_golden_samples(any_llama):
    for sample in SAMPLES:
        length = sample["model_max_length"]
        encoded = encode_conversation(
            sample["record"]["conversations"],
            any_llama,
            image_token_id=IMAGE,
            num_image_tokens=1,
            max_length=length,
            has_image="image" in sample["record"],
        )
        labels = [-100 if label == IMAGE else label for label in sample["labels"][:length]]
        assert encoded["input_ids"] == sample["input_ids"][:length], sample["tag"]
        assert encoded["labels"] == labels, sample["tag"]
        assert encoded["unmatched"] == sample["mismatch_warning"], sample["tag"]


def test_golden_batches(llama):
    by_id = {sample["id"]: sample["record"] for sample in SAMPLES}
    for line in (GOLDEN / "batches.jsonl").read_text(encoding="utf-8").splitlines():
        batch = json.loads(line)
        for row, id_ in enumerate(batch["ids"]):
            encoded = encode_conversation(
                by_id[id_]["conversations"],
                llama,
                image_token_id=IMAGE,
                num_image_tokens=1,
                max_length=batch["model_max_length"],
                has_image="image" in by_id[id_],
            )
            real = sum(batch["attention_mask"][row])
            assert encoded["input_ids"] == batch["input_ids"][row][:real]
            expected = [-100 if label == IMAGE else label for label in batch["labels"][row][:real]]
            assert encoded["labels"] == expected


@pytest.mark.parametrize("copies", [1, 2, 576])
def test_expansion_keeps_text_and_masks_images(llama, copies):
    single = encode(llama, ["<image>\nWhat is it?", "A red  kettle"])
    many = encode(llama, ["<image>\nWhat is it?", "A red  kettle"], copies=copies)
    position = single["input_ids"].index(IMAGE)
    assert many["input_ids"][position : position + copies] == [IMAGE] * copies
    assert many["labels"][position : position + copies] == [-100] * copies
    assert many["input_ids"][position + copies :] == single["input_ids"][position + 1 :]
    assert answers(many) == answers(single)


def test_cut_counts_an_image_as_one(llama):
    whole = encode(llama, ["<image>\nWhat is it?", "A kettle"])
    position = whole["input_ids"].index(IMAGE)
    cut = encode(llama, ["<image>\nWhat is it?", "A kettle"], copies=10, max_length=position + 2)
    assert len(cut["input_ids"]) == position + 10 + 1
    assert answers(cut) == []
    assert not cut["unmatched"]
    before = encode(llama, ["<image>\nWhat is it?", "A kettle"], copies=10, max_length=position)
    assert IMAGE not in before["input_ids"]


def test_image_marker_is_text_without_image(any_llama):
    encoded = encode(any_llama, ["<image>\nWhat?", "A cat"], image=False)
    text = [523, 4075, 28767, 13, 3195, 28804]  # < image > newline What ?
    start = encoded["input_ids"].index(523)
    assert encoded["input_ids"][start : start + len(text)] == text


def test_several_marked_turns_have_one_image_each(llama):
    encoded = encode(llama, ["One <image> <image>", "yes", "two\n<image>", "no"], copies=3)
    assert encoded["input_ids"].count(IMAGE) == 6
    assert not encoded["unmatched"]


@pytest.mark.parametrize(
    "turns",
    [
        ["what", ""],
        ["what", "a", "what", ""],
        ["what", "a </s> b"],
        ["what", "a <unk> b"],
        ["what", "so ASSISTANT: b"],
        ["what ASSISTANT: a", "b"],
        ["what", "a", "what"],
    ],
)
def test_unmatched_is_ignored_completely(llama, turns):
    encoded = encode(llama, turns, image=False)
    assert encoded["unmatched"]
    assert answers(encoded) == []


def test_prompt_is_the_training_text_up_to_the_answer(any_llama):
    question = "How many  wheels?\nAnswer briefly."
    trained = encode(any_llama, [f"<image>\n{question}", "Four"], copies=4)
    prompt = encode_prompt(question, any_llama, image_token_id=IMAGE, num_image_tokens=4)
    assert trained["input_ids"][: len(prompt)] == prompt
    assert trained["labels"][: len(prompt)] == [-100] * len(prompt)
    assert trained["labels"][len(prompt)] != -100


def test_prompt_keeps_spaces_and_moves_markers(llama):
    plain = encode_prompt("  spaced ", llama, image_token_id=IMAGE, num_image_tokens=1)
    stripped = encode_prompt("spaced", llama, image_token_id=IMAGE, num_image_tokens=1)
    assert len(plain) > len(stripped)
    assert encode_prompt("spaced <image>", llama, image_token_id=IMAGE, num_image_tokens=1) == stripped
    text_only = encode_prompt("see <image>", llama, image_token_id=IMAGE, num_image_tokens=1, has_image=False)
    assert IMAGE not in text_only


def test_word_level_tokenizer_by_hand(word_level):
    image_id = WORD_ID["<image>"]
    encoded = encode(word_level, ["<image>\nwhat is", "a cat", "is", "dog"], copies=2, image_id=image_id)
    w = WORD_ID
    first = [w["<s>"], SYSTEM_ID, w["USER"], w[":"], image_id, image_id, w["what"], w["is"], w["ASSISTANT"], w[":"]]
    second = [w["USER"], w[":"], w["is"], w["ASSISTANT"], w[":"]]
    assert encoded["input_ids"] == [*first, w["a"], w["cat"], w["</s>"], *second, w["dog"], w["</s>"]]
    ignored = [-100]
    assert encoded["labels"] == [
        *ignored * len(first), w["a"], w["cat"], w["</s>"], *ignored * len(second), w["dog"], w["</s>"],
    ]  # fmt: skip
    assert not encoded["unmatched"]


def test_word_level_image_token_cannot_come_from_text(word_level):
    image_id = WORD_ID["<image>"]
    encoded = encode(word_level, ["what <image>", "a <image> cat <image>"], image=False, image_id=image_id)
    assert image_id not in encoded["input_ids"]
    assert answers(encoded).count(WORD_ID["image"]) == 2
    assert not encoded["unmatched"]


def test_a_text_may_hold_thousands_of_markers(word_level):
    """More than Python calls may lie within one another."""
    image_id = WORD_ID["<image>"]
    text = "a <image> cat " * 3000 + "<image>"
    encoded = encode(word_level, ["what", text], image=False, image_id=image_id, max_length=20_000)
    word, *marker = (WORD_ID[text] for text in ("a", "<", "image", ">"))
    assert answers(encoded) == [*[word, *marker, WORD_ID["cat"]] * 3000, *marker, WORD_ID["</s>"]]


def test_word_level_unknown_words_are_supervised(word_level):
    encoded = encode(word_level, ["what", "zebra"], image=False)
    assert not encoded["unmatched"]
    assert answers(encoded) == [WORD_ID["<unk>"], WORD_ID["</s>"]]


TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n:<>")), max_size=30)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=3), image=st.booleans())
def test_supervised_text_is_the_answers(llama, turns, image):
    flat = [text for turn in turns for text in turn]
    joined = " ".join(flat)
    if any(literal in joined for literal in ("</s>", "<s>", "<unk>", "<image>", "ASSISTANT: ")):
        return
    encoded = encode(llama, flat, image=image)
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    if any(not question for question, _ in turns):
        return  # an empty question is written without the space in front of the answer's role
    assert not encoded["unmatched"]
    pieces = bytearray()
    for label in answers(encoded):
        token = llama.convert_ids_to_tokens(label)
        pieces += bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("\u2581", " ").encode()
    answers_text = "".join(f" {answer}</s>" for _, answer in turns).replace("\u2581", " ")
    assert pieces.decode() == answers_text


def test_wrong_conversations_are_refused(llama, word_level):
    def refused(roles):
        with pytest.raises(InputError) as caught:
            encode_conversation(
                [{"from": role, "value": "x"} for role in roles],
                llama,
                image_token_id=IMAGE,
                num_image_tokens=1,
                max_length=99,
            )
        return str(caught.value)

    assert "turn 2" in refused(["human", "human"])
    assert "no human turn" in refused(["gpt"])
    assert "'system'" in refused(["system", "human"])


def test_unfit_tokenizers_are_refused(word_level):
    no_unk = copy.deepcopy(word_level)
    no_unk.unk_token = None
    with pytest.raises(InputError, match="no unk token"):
        encode(no_unk, ["what", "cat"])
    other_eos = copy.deepcopy(word_level)
    other_eos.eos_token = "<s>"
    with pytest.raises(InputError, match="eos token"):
        encode(other_eos, ["what", "cat"])
