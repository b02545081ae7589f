"""Samples agree with the encoding and the pixels they are made of, however images are cut; the audit finds the rest."""

import numpy as np
import pytest
import torch
from data_vocabulary import WORD_ID
from PIL import Image
from torch.utils.data import DataLoader

from llava_cl.data import (
    ConversationDataset,
    GlobalBatchSampler,
    QuestionDataset,
    QuestionRecord,
    TrainRecord,
    VicunaChat,
    collate_train,
    load_image,
    preprocess_image,
)
from llava_cl.errors import InputError

IMAGE = WORD_ID["<image>"]
SETTINGS = {"image_size": 8}


def record(id_, images, *texts):
    roles = ("human", "gpt")
    return TrainRecord(id_, images, tuple({"from": roles[i % 2], "value": text} for i, text in enumerate(texts)))


@pytest.fixture
def root(tmp_path):
    for name, colour in (("red.png", (255, 0, 0)), ("green.png", (0, 255, 0)), ("blue.png", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def dataset(root, word_level):
    def build(*records, **changes):
        return ConversationDataset(records, root, VicunaChat(word_level, IMAGE, 4), **{**SETTINGS, **changes})

    return build


def colours(sample):
    """The brightest channel of each image."""
    return sample["pixel_values"].mean(dim=(2, 3)).argmax(dim=1).tolist()


def test_sample(dataset, root):
    sample = dataset(record("a", ("green.png",), "<image>\nwhat", "cat"))[0]
    assert sample["input_ids"].count(IMAGE) == 4
    assert [label for label in sample["labels"] if label != -100] == [WORD_ID["cat"], WORD_ID["</s>"]]
    assert sample["index"] == 0
    assert sample["pixel_values"].dtype == torch.float32
    np.testing.assert_array_equal(
        sample["pixel_values"][0].numpy(), preprocess_image(Image.open(root / "green.png"), size=8)
    )


def test_text_only_and_unmarked_images_have_no_pixels(dataset):
    samples = dataset(record("a", (), "<image> what", "cat"), record("b", ("red.png",), "what", "cat"))
    for index in (0, 1):
        assert "pixel_values" not in samples[index]
        assert IMAGE not in samples[index]["input_ids"]


def test_images_of_one_turn_and_of_several(dataset):
    images = ("blue.png", "red.png")
    samples = dataset(
        record("a", images, "<image> what", "cat"), record("b", images, "<image> what", "cat", "<image> is", "dog")
    )
    for index in (0, 1):
        assert colours(samples[index]) == [2, 0]
        assert samples[index]["input_ids"].count(IMAGE) == 8
    first = samples[0]["input_ids"].index(IMAGE)
    assert samples[0]["input_ids"][first : first + 8] == [IMAGE] * 8


@pytest.mark.parametrize("texts", [("<image> what", "cat"), ("<image> what", "cat", "<image> is", "dog")])
def test_no_cut_leaves_part_of_an_image(dataset, texts):
    images = ("blue.png", "red.png")
    whole = dataset(record("a", images, *texts))[0]
    for max_length in range(3, len(whole["input_ids"]) + 2):
        sample = dataset(record("a", images, *texts), max_length=max_length)[0]
        kept = sample["input_ids"].count(IMAGE)
        assert len(sample["input_ids"]) == len(sample["labels"]) <= max_length
        assert sample["input_ids"] == whole["input_ids"][: len(sample["input_ids"])]
        assert kept % 4 == 0
        assert colours(sample) == [2, 0][: kept // 4] if kept else "pixel_values" not in sample


def test_padding_sample_is_the_first_without_labels(dataset):
    samples = dataset(record("a", ("red.png",), "<image> what", "cat"), record("b", (), "what", "dog"))
    padding, first = samples[-1], samples[0]
    assert padding["index"] == -1
    assert padding["input_ids"] == first["input_ids"]
    assert set(padding["labels"]) == {-100}
    assert torch.equal(padding["pixel_values"], first["pixel_values"])


def test_audit_opens_no_image(dataset):
    samples = dataset(
        record("good", ("absent.png",), "<image> what", "cat"),
        record("empty", ("absent.png",), "<image> what", ""),
        record("role", (), "what", "a ASSISTANT: cat"),
        record("long", (), "what " * 40, "cat"),
        record("images", ("absent.png",) * 9, "<image> what", "cat"),
        record("short", (), "what", "cat"),
        max_length=30,
    )
    found = samples.audit()
    assert [(sample.index, sample.id) for sample in found] == [(1, "empty"), (2, "role"), (3, "long"), (4, "images")]
    assert ["first 30 tokens" in sample.reason for sample in found] == [False, False, True, True]


def test_missing_image_is_named(dataset):
    with pytest.raises(InputError, match=r"absent\.png"):
        dataset(record("a", ("absent.png",), "<image> what", "cat"))[0]


def test_loader_with_the_sampler(dataset):
    samples = dataset(*[record(i, ("red.png",) * (i % 3), "<image> what", "cat " * (i + 1)) for i in range(7)])
    lengths = [1, 2, 3, 4, 5, 6, 7]
    seen = []
    for rank in range(2):
        sampler = GlobalBatchSampler(lengths, 4, 2, rank, 2, 0)
        loader = DataLoader(samples, batch_sampler=sampler, collate_fn=lambda batch: collate_train(batch, 0))
        for batch in loader:
            seen += batch["index"].tolist()
            assert (batch["input_ids"] == IMAGE).sum() == 4 * len(batch.get("pixel_values", ()))
    assert sorted(index for index in seen if index != -1) == list(range(7))


def test_questions(root, word_level):
    questions = QuestionDataset(
        [
            QuestionRecord("a", ("red.png", "green.png"), "what is", "cat"),
            QuestionRecord(2, (), "what <image>", "dog"),
        ],
        root,
        VicunaChat(word_level, IMAGE, 4),
        **SETTINGS,
    )
    first, second, padding = questions[0], questions[1], questions[-1]
    assert len(questions) == 2
    assert first["input_ids"].count(IMAGE) == 8
    assert first["input_ids"][-2:] == [WORD_ID["ASSISTANT"], WORD_ID[":"]]
    assert colours(first) == [0, 1]
    assert "pixel_values" not in second
    assert IMAGE not in second["input_ids"]
    assert padding["input_ids"] == first["input_ids"]
    assert (first["index"], second["index"], padding["index"]) == (0, 1, -1)
    assert first["images"] == ("red.png", "green.png")
    assert first["input_ids"][first["start"] - 1] == IMAGE
    assert IMAGE not in first["input_ids"][first["start"] :]
    assert questions.lengths() == [len(first["input_ids"]), len(second["input_ids"])]


def test_images_of_a_batch_of_questions_are_read_once(root, word_level, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "llava_cl.data.dataset.load_image", lambda path, folder: opened.append(path) or load_image(path, folder)
    )
    names = ("red.png", "green.png", "red.png", "red.png")
    questions = QuestionDataset(
        [QuestionRecord(index, (name,), "what is", "cat") for index, name in enumerate(names)],
        root,
        VicunaChat(word_level, IMAGE, 4),
        **SETTINGS,
    )
    samples = questions.__getitems__([3, 1, 0])
    assert opened == ["red.png", "green.png"]
    assert [sample["index"] for sample in samples] == [3, 1, 0]
    assert [colours(sample) for sample in samples] == [[0], [1], [0]]
