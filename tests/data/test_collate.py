"""Padding on either side, against stored batches and by hand."""

import json
from pathlib import Path

import torch

from llava_cl.data import collate_prompts, collate_train

GOLDEN = Path(__file__).parents[1] / "golden" / "conversations"


def sample(ids, index, images=0):
    made = {"input_ids": ids, "labels": [-100, *ids[1:]], "index": index}
    return {**made, "pixel_values": torch.full((images, 3, 2, 2), float(index))} if images else made


def test_golden_batches():
    samples = {}
    for line in (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        stored = json.loads(line)
        samples[stored["id"]] = stored
    for line in (GOLDEN / "batches.jsonl").read_text(encoding="utf-8").splitlines():
        expected = json.loads(line)
        cut = expected["model_max_length"]
        batch = collate_train(
            [
                {"input_ids": samples[id_]["input_ids"][:cut], "labels": samples[id_]["labels"][:cut], "index": row}
                for row, id_ in enumerate(expected["ids"])
            ],
            pad_id=0,
        )
        for key in ("input_ids", "labels", "attention_mask"):
            assert batch[key].tolist() == torch.tensor(expected[key]).long().tolist()
            assert batch[key].dtype == torch.int64


def test_train_batch_pads_on_the_right():
    batch = collate_train([sample([1, 0, 5], 4, images=2), sample([1, 7, 8, 2], 9), sample([1], -1, images=1)], 0)
    assert batch["input_ids"].tolist() == [[1, 0, 5, 0], [1, 7, 8, 2], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 5, -100], [-100, 7, 8, 2], [-100] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["index"].tolist() == [4, 9, -1]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [4, 4, -1]


def test_prompts_pad_on_the_left():
    batch = collate_prompts([sample([1, 5], 0), sample([1, 7, 8], 1)], 9)
    assert batch["input_ids"].tolist() == [[9, 1, 5], [1, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert "labels" not in batch
    assert "pixel_values" not in batch


def test_prompts_about_one_image_share_their_start():
    def about(image, ids, start, index):
        pixels = torch.full((1, 3, 2, 2), float(len(image)))
        return {"input_ids": ids, "index": index, "images": (image,), "start": start, "pixel_values": pixels}

    samples = [
        about("a", [1, 3, 3, 7], 3, 0),
        about("bb", [1, 4, 3, 3, 8, 8, 8], 4, 1),
        about("a", [1, 3, 3, 5, 6], 3, 2),
    ]
    batch = collate_prompts(samples, 9)
    assert batch["start_ids"].tolist() == [[9, 1, 3, 3], [1, 4, 3, 3]]
    assert batch["start_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["start_of"].tolist() == [0, 1, 0]
    assert batch["input_ids"].tolist() == [[9, 9, 7], [8, 8, 8], [9, 5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    assert batch["index"].tolist() == [0, 1, 2]


def test_the_same_text_before_other_images_is_no_shared_start():
    samples = [
        {"input_ids": [1, 3, 7], "index": index, "images": (image,), "start": 2, "pixel_values": torch.ones(1, 3, 2, 2)}
        for index, image in enumerate("ab")
    ]
    batch = collate_prompts(samples, 9)
    assert "start_ids" not in batch
    assert batch["input_ids"].tolist() == [[1, 3, 7]] * 2
    assert len(batch["pixel_values"]) == 2


def test_text_alone_beside_questions_about_one_image_shares_no_start():
    samples = [
        {"input_ids": [1, 3, 7], "index": index, "images": ("a",), "start": 2, "pixel_values": torch.ones(1, 3, 2, 2)}
        for index in range(2)
    ]
    batch = collate_prompts([*samples, {"input_ids": [1, 5], "index": 2}], 9)
    assert "start_ids" not in batch
    assert batch["input_ids"].tolist() == [[1, 3, 7], [1, 3, 7], [9, 1, 5]]
    assert len(batch["pixel_values"]) == 2
