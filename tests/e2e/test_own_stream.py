"""A stream of one's own, written as the README shows it, runs to its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_cl.config import load_config
from runs import run_here

ROOT = Path(__file__).parents[2]


def test_the_stream_of_the_readme_runs(tiny_run: Path, tmp_path: Path) -> None:
    example = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 10
    file = tmp_path / "mine.yaml"
    file.write_text(example.replace("ucit_keeplora.yaml", str(ROOT / "configs" / "runs" / "ucit_keeplora.yaml")))
    data = tmp_path / "data"
    for name, task in (("receipts", "Colour"), ("plants", "Tone")):
        shutil.copytree(tiny_run / "data" / task, data / name)
        shutil.copytree(tiny_run / "data" / "images", data / name / "images")
    small = [
        f"data_root={data}",
        f"model.path={tiny_run / 'model'}",
        "model.dtype=float32",
        "lora.rank=4",
        "training.global_batch=8",
        "training.micro_batch=4",
        "training.max_length=128",
        "training.gradient_checkpointing=false",
        "training.workers=0",
        "measurement.ratio=0.5",
        "evaluation.max_new_tokens=3",
        "distributed.deepspeed=null",
        "distributed.ranks=1",
    ]
    metrics = run_here(load_config(file, small), tmp_path / "run")
    assert metrics["tasks"] == ["Receipts", "Plants"]
    assert [len(row) for row in metrics["matrix"]] == [2, 2]
    answers = (tmp_path / "run" / "stages" / "02-Plants" / "predictions" / "Receipts.jsonl").read_text().splitlines()
    asked = json.loads((data / "receipts" / "test.json").read_text())
    assert [json.loads(line)["question_id"] for line in answers] == [record["question_id"] for record in asked]
