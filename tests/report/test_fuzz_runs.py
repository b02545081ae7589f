"""1,000 damaged run directories: read for the report, or refused in sentences that name the directory."""

from __future__ import annotations

import json
import random
from pathlib import Path

from report_runs import write_run

from llava_cl.pipeline.job import recorded_config
from llava_cl.report.load import load_run
from mutations import accepted, damage, fuzz, json_text, mutate


def test_run_directories(tmp_path: Path) -> None:
    write_run(tmp_path, done=2)
    names = ["run.json", "metrics.json", "stages/02-ArxivQA/scores.json", "stages/02-ArxivQA/train_log.jsonl"]
    files = [tmp_path / name for name in names]
    good = [file.read_bytes() for file in files]

    def make(choice: random.Random) -> bytes:
        which = choice.randrange(len(files))
        content = good[which]
        if which < 3 and choice.random() < 0.7:
            content = json_text(mutate(json.loads(content), choice, choice.randrange(1, 3)), choice).encode(
                "utf-8", "replace"
            )
        else:
            content = damage(content, choice)
        return bytes([which]) + content

    def check(content: bytes) -> None:
        file = files[content[0]]
        file.write_bytes(content[1:])
        accepted(lambda: load_run(tmp_path), tmp_path)
        if content[0] == 0:
            accepted(lambda: recorded_config(tmp_path), tmp_path)
        file.write_bytes(good[content[0]])

    fuzz(1000, make, check)
