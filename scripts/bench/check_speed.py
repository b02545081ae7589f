"""Time of `llava-cl check` for the data of a task of UCIT's size: 40,000 records, each with its own JPEG of 640 x 480.

    python scripts/bench/check_speed.py --output runs/check_speed

Pictures are enlarged from the playground's with grain put on them, which makes files as large as a photograph's; the
40,000 files are copies of a hundred different ones. Questions are UCIT's longest kind, multi-line multiple choice. The
vocabulary has LLaMA's size and rules (mistral-common's, from the dev extra); the model has not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from llava_cl.config import load_config
from llava_cl.pipeline.data_checks import check_records

ROOT = Path(__file__).parents[2]
DIFFERENT = 100
QUESTION = (
    "<image>\nWhat distinguishes the spectrum in the upper panel from the one measured at a higher temperature?\n"
    "A) Its peaks are narrower and shifted\nB) It has fewer peaks\nC) It has no background\nD) Nothing\n"
    "Rationale: the width of a line grows with the temperature, as the caption of the figure says.\n"
    "Answer with the option's letter from the given choices directly."
)


def build(folder: Path, records: int) -> None:
    """Writes a data root with one task of `records` training records; pictures that are there stay."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "playground" / "data").rglob("*.png"))[:DIFFERENT]
    noise = np.random.default_rng(0)
    originals = []
    for index, source in enumerate(sources):
        picture = np.asarray(Image.open(source).convert("RGB").resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        grain = noise.normal(0, 8, picture.shape)
        originals.append(folder / f"original-{index:03d}.jpg")
        Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8)).save(originals[-1], quality=85)
    for index in range(records):
        if not (images / f"{index:05d}.jpg").exists():
            shutil.copyfile(originals[index % len(originals)], images / f"{index:05d}.jpg")
    train = [
        {
            "id": index,
            "image": f"images/{index:05d}.jpg",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "ABCD"[index % 4]}],
        }
        for index in range(records)
    ]
    test = [{"question_id": 0, "image": "images/00000.jpg", "text": QUESTION.replace("<image>\n", ""), "answer": "A"}]
    model = folder / "model"
    shutil.copytree(ROOT / "playground" / "model", model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("token*"))
    package = importlib.util.find_spec("mistral_common")
    assert package is not None and package.origin is not None
    shutil.copyfile(Path(package.origin).parent / "data" / "tokenizer.model.v1", model / "tokenizer.model")
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    task = {"name": "Big", "train": "train.json", "test": "test.json", "images": ".", "scorer": "exact"}
    run = {
        "extends": str(ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml"),
        "data_root": str(folder),
        "model": {"path": str(model)},
        "training": {"max_length": 2048},
        "benchmark": {"name": "big", "tasks": [task], "probes": []},
    }
    (folder / "run.yaml").write_text(json.dumps(run))


def main() -> None:
    """Builds the data and times the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for data and result")
    parser.add_argument("--records", type=int, default=40_000)
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    build(folder, arguments.records)
    config = load_config(folder / "run.yaml")
    size = sum(file.stat().st_size for file in (folder / "images").iterdir())
    start = time.perf_counter()
    check_records(config)
    seconds = time.perf_counter() - start
    result = {"records": arguments.records, "image_bytes": size, "seconds": round(seconds, 2)}
    (folder / "check_speed.json").write_text(json.dumps(result))
    print(f"{arguments.records} records, {size / 1e9:.2f} GB of images: {seconds:.1f} s")


if __name__ == "__main__":
    main()
