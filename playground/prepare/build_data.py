"""Draw and write both streams and the base's probe questions.

Usage: python playground/prepare/build_data.py --out playground/data [--streams UCIT Domain_data Base]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import general_questions
import pictures
import splits
import tasks_domain
import tasks_general
from tasks import Task

COUNTS: dict[splits.Part, int] = {"train": 540, "val": 100, "test": 200}
PROBE_PER_KIND = 20
PROBE_KINDS = tuple(general_questions.KIND_WORDS)


def save_picture(image: Image.Image, suffix: str, path: Path, colours: int = 64) -> None:
    """Write one picture: ".png" in ``colours`` colours, ".raw.png" in grey, another suffix as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".png":
        image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    elif suffix == ".raw.png":
        image.convert("L").save(path, optimize=True)
    else:
        image.save(path, quality=88, optimize=True)


def sample(task: Task, part: splits.Part, count: int) -> list[tuple[Image.Image, str, str, pictures.Facts]]:
    """``count`` different pictures of ``part`` with question and answer, answers as even as the sources allow."""
    rng = np.random.default_rng([splits.SEED, *f"{task.name}/{part}".encode()])
    items = splits.items(task.kind, part)
    items = [x for k, x in enumerate(items) if task.kind != "digit" or k % 2 == (task.name == "NumberWords")]
    buckets: dict[str, list[tuple[Image.Image, str, str, pictures.Facts]]] = {}
    seen: set[bytes] = set()
    once = task.kind in ("garment", "digit", "outline", "chart", "molecule")
    for _ in range(1 if once else 40):
        for k in rng.permutation(len(items)):
            made = pictures.make(task.kind, items[int(k)], rng)
            asked = task.ask(made[1], rng) if made else None
            if made is None or asked is None or made[0].tobytes() in seen:
                continue
            image, facts = made
            bucket = buckets.setdefault(task.balance_by(facts) if task.balance_by else asked[1], [])
            if len(bucket) < count:
                seen.add(image.tobytes())
                bucket.append((image, *asked, facts))
        if sum(min(len(b), count // len(buckets)) for b in buckets.values()) >= count * 0.98:
            break
    chosen: list[tuple[Image.Image, str, str, pictures.Facts]] = []
    while len(chosen) < count:
        filled = [b for _, b in sorted(buckets.items()) if b]
        if not filled:
            raise ValueError(f"{task.name}/{part}: only {len(chosen)} of {count} pictures")
        chosen += [b.pop() for b in filled]
    return [chosen[int(k)] for k in rng.permutation(count)]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_task(task: Task, folder: Path, images: Path, prefix: str) -> None:
    """Write one task: its three record files in ``folder``, its pictures below ``images``/``prefix``."""
    for part, count in COUNTS.items():
        records: list[dict[str, Any]] = []
        references: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for k, (image, question, answer, facts) in enumerate(sample(task, part, count)):
            file = f"{prefix}/{part}/{k:04d}{'.png' if 'png' in task.suffix else '.jpg'}"
            save_picture(image, task.suffix, images / file)
            if part == "train":
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                records.append({"id": f"{task.name}-{part}-{k}", "image": file, "conversations": turns})
                continue
            records.append(
                {"question_id": f"{task.name}-{part}-{k}", "image": file, "text": question, "answer": answer}
            )
            if task.references:
                references["images"].append({"id": k + 1, "file_name": file})
                for caption in task.references(facts):
                    number = len(references["annotations"]) + 1
                    references["annotations"].append({"id": number, "image_id": k + 1, "caption": caption})
        write_json(folder / f"{part}.json", records)
        if references["images"]:
            write_json(folder / f"{part}_coco_type.json", references)
        answers = Counter(r["conversations"][1]["value"] if part == "train" else r["answer"] for r in records)
        share = answers.most_common(1)[0][1] / len(records)
        print(f"{task.name:14} {part:5} {len(records):4} records, {len(answers):3} answers, most frequent {share:.3f}")


def write_probe(folder: Path, images: Path, prefix: str) -> None:
    """Write the base's probe: one general question about each of ``PROBE_PER_KIND`` unseen pictures of every kind."""
    rng = np.random.default_rng([splits.SEED, 99])
    records = []
    for kind in PROBE_KINDS:
        items = splits.items(kind, "probe")
        made_here = 0
        for k in rng.permutation(len(items)).tolist() * 3:
            made = pictures.make(kind, items[k], rng, vary=True)
            if made is None:
                continue
            questions = general_questions.about(made[1], rng)
            question, answer = questions[int(rng.integers(len(questions)))]
            file = f"{prefix}/{kind}-{made_here:02d}.jpg"
            save_picture(made[0], ".jpg", images / file)
            records.append(
                {"question_id": f"base-{kind}-{made_here}", "image": file, "text": question, "answer": answer}
            )
            made_here += 1
            if made_here == PROBE_PER_KIND:
                break
    write_json(folder / "test.json", records)
    print(f"BaseQuestions  test  {len(records):4} records")


def main() -> None:
    """Write everything asked for, replacing what was there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", help="only these tasks (BaseQuestions: the probe)")
    options = parser.parse_args()
    general, domain = options.out / "UCIT", options.out / "Domain_data"
    for task in tasks_general.TASKS:
        if not options.tasks or task.name in options.tasks:
            for folder in (general / task.name, general / "datasets" / task.name):
                shutil.rmtree(folder, ignore_errors=True)
            write_task(task, general / task.name, general / "datasets", task.name)
    for task in tasks_domain.TASKS:
        if not options.tasks or task.name in options.tasks:
            shutil.rmtree(domain / task.name, ignore_errors=True)
            write_task(task, domain / task.name, domain / task.name, "images")
    if not options.tasks or "BaseQuestions" in options.tasks:
        write_probe(general / "BaseQuestions", general / "datasets", "BaseQuestions")


if __name__ == "__main__":
    main()
