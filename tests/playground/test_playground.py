"""The embedded streams and their base: layout, schema, splits, vocabulary, size, and a model that loads and answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_cl.data import encode_conversation, encode_prompt, load_image, preprocess_image

ROOT = Path(__file__).resolve().parents[2] / "playground"
MODEL = ROOT / "model"
UCIT = ("Fashion", "IconGroups", "SceneCaptions", "FlagColours", "Counting", "NumberWords")
DOMAINS = ("Satellite", "Chemistry", "Handwriting", "Zoology", "Finance")
SIZES = {"train": (500, 600), "val": (100, 100), "test": (200, 200)}
MOST_FREQUENT = {"Finance": 0.35}
SIDE, IMAGE_TOKENS = 72, 36


def place(task: str) -> tuple[Path, Path]:
    """(folder of the record files, folder that image paths are relative to)."""
    if task in DOMAINS:
        return ROOT / "data" / "Domain_data" / task, ROOT / "data" / "Domain_data" / task
    return ROOT / "data" / "UCIT" / task, ROOT / "data" / "UCIT" / "datasets"


@cache
def records(task: str, part: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((place(task)[0] / f"{part}.json").read_text(encoding="utf-8"))
    return loaded


def turns(record: dict[str, Any]) -> list[dict[str, str]]:
    if "conversations" in record:
        return record["conversations"]
    return [{"from": "human", "value": f"<image>\n{record['text']}"}, {"from": "gpt", "value": record["answer"]}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.mark.parametrize("task", [*UCIT, *DOMAINS])
def test_records_have_the_benchmarks_schema_and_their_images_exist(task: str) -> None:
    images = place(task)[1]
    for part, (least, most) in SIZES.items():
        found = records(task, part)
        assert least <= len(found) <= most
        key = "id" if part == "train" else "question_id"
        assert len({r[key] for r in found}) == len(found)
        for record in found:
            assert (images / record["image"]).is_file()
            if task in DOMAINS:
                assert record["image"].startswith("images/")
            if part != "train":
                assert set(record) == {"question_id", "image", "text", "answer"}
                assert "<image>" not in record["text"]
                continue
            assert set(record) == {"id", "image", "conversations"}
            assert [t["from"] for t in record["conversations"]] == ["human", "gpt"]
            assert record["conversations"][0]["value"].startswith("<image>\n")


@pytest.mark.parametrize("task", [*UCIT, *DOMAINS])
def test_no_picture_is_in_two_splits_or_twice_in_one(task: str) -> None:
    images = place(task)[1]
    shown: Counter[bytes] = Counter()
    for part in SIZES:
        for record in records(task, part):
            pixels = load_image(record["image"], images)
            shown[hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()] += 1
    assert max(shown.values()) == 1


def test_streams_share_no_picture_with_each_other_or_the_probe() -> None:
    owners: dict[bytes, set[str]] = {}
    for task in (*UCIT, *DOMAINS, "BaseQuestions"):
        for part in SIZES if task != "BaseQuestions" else ("test",):
            for record in records(task, part):
                file = place(task)[1] / record["image"]
                owners.setdefault(hashlib.sha256(file.read_bytes()).digest(), set()).add(task)
    assert not [names for names in owners.values() if len(names) > 1]


@pytest.mark.parametrize("task", [t for t in (*UCIT, *DOMAINS) if t != "SceneCaptions"])
@pytest.mark.parametrize("part", list(SIZES))
def test_no_answer_is_frequent_enough_to_be_guessed(task: str, part: str) -> None:
    answers = Counter(turns(r)[1]["value"] for r in records(task, part))
    assert len(answers) >= 4
    assert answers.most_common(1)[0][1] / answers.total() <= MOST_FREQUENT.get(task, 0.35)


@pytest.mark.parametrize("part", ["val", "test"])
def test_captions_have_references_numbered_by_position(part: str) -> None:
    folder, _ = place("SceneCaptions")
    found = json.loads((folder / f"{part}_coco_type.json").read_text())
    asked = records("SceneCaptions", part)
    assert set(found) == {"images", "annotations"}
    assert [(i["id"], i["file_name"]) for i in found["images"]] == [(k + 1, r["image"]) for k, r in enumerate(asked)]
    captions: dict[int, list[str]] = {}
    for note in found["annotations"]:
        captions.setdefault(note["image_id"], []).append(note["caption"])
    assert len({n["id"] for n in found["annotations"]}) == len(found["annotations"])
    assert sorted(captions) == list(range(1, len(asked) + 1))
    for k, record in enumerate(asked):
        assert len(set(captions[k + 1])) >= 3
        assert record["answer"] in captions[k + 1]


def test_probe_asks_about_every_kind_of_picture() -> None:
    probe = records("BaseQuestions", "test")
    assert len(probe) == 200
    assert len({r["question_id"].split("-")[1] for r in probe}) == 10
    task_questions = {r["text"] for t in (*UCIT, *DOMAINS) for r in records(t, "test")}
    assert not task_questions & {r["text"] for r in probe}


def test_the_playground_is_small() -> None:
    folders = (ROOT / "data", MODEL)
    data, model = (sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in folders)
    assert data + model <= 30e6
    assert model <= 12e6


def test_every_record_is_inside_the_vocabulary_and_exactly_its_answer_is_supervised(tokenizer: Any) -> None:
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    checked = set()
    for task in (*UCIT, *DOMAINS, "BaseQuestions"):
        for part in SIZES if task != "BaseQuestions" else ("test",):
            for record in records(task, part):
                question, answer = (t["value"] for t in turns(record))
                if (question, answer) in checked:
                    continue
                checked.add((question, answer))
                made = encode_conversation(
                    turns(record), tokenizer, image_token_id=image_id, num_image_tokens=IMAGE_TOKENS, max_length=2048
                )
                assert not made["unmatched"]
                assert tokenizer.unk_token_id not in made["input_ids"]
                assert made["input_ids"].count(image_id) == IMAGE_TOKENS
                supervised = [label for label in made["labels"] if label != -100]
                assert supervised[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(supervised, skip_special_tokens=True) == answer


def test_tokenizer_follows_llamas_conventions(tokenizer: Any) -> None:
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("USER: red ASSISTANT: ").input_ids)
    assert pieces == ["<s>", "\u2581USER", ":", "\u2581red", "\u2581ASSISTANT", ":", "\u2581"]
    assert tokenizer("\nA) red").input_ids[0] == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer("\nA) red").input_ids)[1:] == [
        "\u2581",
        "\n",
        "\u2581A",
        ")",
        "\u2581red",
    ]
    text = "a red ball to the left of a t-shirt"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids("<image>") not in (0, 1, 2)


def test_the_model_loads_and_answers_with_known_words(tokenizer: Any) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()
    assert sum(p.numel() for p in model.parameters()) < 6e6
    record = records("BaseQuestions", "test")[0]
    ids = encode_prompt(
        record["text"], tokenizer, image_token_id=model.config.image_token_id, num_image_tokens=IMAGE_TOKENS
    )
    pixels = preprocess_image(load_image(record["image"], place("BaseQuestions")[1]), size=SIDE)
    made = model.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.from_numpy(pixels)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
    )
    answer = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert answer.strip()
    assert tokenizer(answer).input_ids.count(tokenizer.unk_token_id) == 0


def test_the_base_knows_most_of_its_probe(tokenizer: Any) -> None:
    """Exact answers by teacher forcing equal greedy answers; a model with drawn weights has almost none right."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True).eval()
    right = 0
    probe = records("BaseQuestions", "test")[::4]
    for record in probe:
        made = encode_conversation(
            turns(record),
            tokenizer,
            image_token_id=model.config.image_token_id,
            num_image_tokens=IMAGE_TOKENS,
            max_length=2048,
        )
        pixels = preprocess_image(load_image(record["image"], place("BaseQuestions")[1]), size=SIDE)
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([made["input_ids"]]), pixel_values=torch.from_numpy(pixels)[None]
            ).logits
        labels = torch.tensor(made["labels"][1:])
        known = labels != -100
        right += bool((logits[0, :-1].argmax(-1)[known] == labels[known]).all())
    assert right / len(probe) > 0.75
