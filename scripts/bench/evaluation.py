"""Speed and answers of the evaluation against the published code's loop, in one process and one run.

    python scripts/bench/evaluation.py --output runs/bench_evaluation
    python scripts/bench/evaluation.py --output runs/bench_evaluation --run runs/playground_ucit --stage 3

The loop, as KeepLoRA's evaluation goes: one question at a time, its image read and sent through the tower, greedy
generation with a KV cache at batch size 1. Both answer the same questions with the same model, in turns; a row is the
median over the repeats. Seconds are of the clock, and of this process on the CPU, which other processes disturb less.
Two rows more: eight questions about every image, as several tasks of MLLM-DCL ask them, and answers of the greatest
length, which no end token cuts short. A second table has the seconds of the first forward pass by batch size, against
those of its arithmetic alone, at the speed of one large product: no batch can be faster than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_cl.config import RunConfig, TaskConfig, load_config
from llava_cl.data import QuestionRecord, collate_prompts
from llava_cl.distributed import World
from llava_cl.pipeline.conversations import Conversations
from llava_cl.pipeline.job import Job, recorded_config
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.task_data import read_questions
from llava_cl.store import RunDirectory

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE = World(0, 1, DEVICE)
PER_IMAGE = 8
LONGEST = "longest"


def one_by_one(
    samples: Conversations, model: Any, task: TaskConfig, questions: list[QuestionRecord], config: RunConfig
) -> tuple[list[str], int]:
    """The loop: answers, and how many tokens were generated."""
    tokenizer = samples.family.tokenizer()
    dataset = samples.questions(task, questions)
    answers, tokens = [], 0
    for index in range(len(questions)):
        batch = collate_prompts([dataset[index]], tokenizer.pad_token_id)
        del batch["index"]
        with torch.inference_mode():
            output = model.generate(
                **{key: value.to(DEVICE) for key, value in batch.items()},
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=config.evaluation.max_new_tokens,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        tokens += new.shape[1]
        answers.append(tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers, tokens


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds of the clock, seconds of this process."""
    clock, own = time.perf_counter(), time.process_time()
    result = function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - clock, time.process_time() - own


class Bench:
    """A configuration with its model."""

    def __init__(self, config: RunConfig, run: Path | None, stage: int) -> None:
        directory = RunDirectory(run or Path("none"), [task.name for task in config.benchmark.tasks])
        job = Job(config, directory, ALONE, ProgressWriter(None))
        assert isinstance(job.samples, Conversations)
        self.config, self.samples, self.stage = config, job.samples, stage
        self.model = job.load_model(stage)
        self._stop = self.model.generation_config.eos_token_id

    def never_ends(self, yes: bool) -> None:
        """Whether answers go on to the greatest length."""
        self.model.generation_config.eos_token_id = None if yes else self._stop

    def loop(self, task: TaskConfig, questions: list[QuestionRecord]) -> tuple[list[str], int]:
        return one_by_one(self.samples, self.model, task, questions, self.config)

    def ours(self, task: TaskConfig, questions: list[QuestionRecord]) -> list[str]:
        return self.samples.answer(self.model, self.stage, task, questions, ALONE, lambda done, total: None)


def about_the_same(questions: list[QuestionRecord], texts: list[str]) -> list[QuestionRecord]:
    """As many questions, `PER_IMAGE` of the texts about each image."""
    images = [question.images for question in questions[: -(-len(questions) // PER_IMAGE)]]
    return [
        QuestionRecord(index, images[index // PER_IMAGE], texts[index % PER_IMAGE], "")
        for index in range(len(questions))
    ]


def first_pass(bench: Bench, task: TaskConfig, questions: list[QuestionRecord]) -> dict[str, float]:
    """Milliseconds of this process for each question, by batch size, and of the arithmetic alone."""
    dataset = bench.samples.questions(task, questions)
    padding = bench.samples.family.tokenizer().pad_token_id
    found: dict[str, float] = {}
    for size in (size for size in (1, 4, 16, 50) if size <= len(questions)):
        batch = collate_prompts([dataset[index] for index in range(size)], padding)
        batch = {key: value.to(DEVICE) for key, value in batch.items() if key != "index"}

        def run(batch: dict[str, torch.Tensor] = batch) -> None:
            with torch.inference_mode():
                bench.model(**batch, use_cache=True, logits_to_keep=1)

        found[f"batch {size}"] = 1000 * statistics.median(timed(run)[2] for _ in range(7)) / size
        if size == 1:
            with FlopCounterMode(display=False) as counter:
                run()
    left, right = (torch.randn(2048, 2048, device=DEVICE) for _ in range(2))
    product = statistics.median(timed(lambda: left @ right)[2] for _ in range(7))
    found["arithmetic"] = 1000 * counter.get_total_flops() * product / (2 * 2048**3)
    print("first pass, ms a question: " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def main() -> None:
    """Runs all tasks, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result")
    parser.add_argument("--run", type=Path, help="a run directory; default the playground's base model")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--questions", type=int, default=50, help="of each task")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    run = arguments.run
    playground = ROOT / "configs" / "runs" / "playground_ucit_keeplora.yaml"

    def config(dtype: str) -> RunConfig:
        overrides = [f"model.dtype={dtype}"]
        return recorded_config(run, overrides) if run else load_config(playground, overrides)

    full, half = (Bench(config(dtype), run, arguments.stage) for dtype in ("float32", "bfloat16"))
    work: list[tuple[str, TaskConfig, list[QuestionRecord]]] = []
    for task in full.config.benchmark.evaluated:
        assert isinstance(task, TaskConfig)
        work.append((task.name, task, list(read_questions(full.config, task))[: arguments.questions]))
    texts = list(dict.fromkeys(question.text for _, _, asked in reversed(work) for question in asked))[:PER_IMAGE]
    work.append((f"{PER_IMAGE} an image", work[0][1], about_the_same(work[0][2], texts)))
    work.append((LONGEST, work[0][1], work[0][2]))
    rows: list[dict[str, Any]] = []
    head = f"{'task':<14}{'tokens':>7}{'loop q/s':>10}{'ours q/s':>10}{'ratio':>7}{'CPU ratio':>10}"
    print(head + f"{'differ fp32':>13}{'differ bf16':>13}", flush=True)
    for name, task, asked in work:
        for bench in (full, half):
            bench.never_ends(name == LONGEST)
        full.ours(task, asked[:2])
        loops, ours = [], []
        for _ in range(arguments.repeats):
            loops.append(timed(lambda task=task, asked=asked: full.loop(task, asked)))
            ours.append(timed(lambda task=task, asked=asked: full.ours(task, asked)))
        reference, tokens = loops[0][0]
        pairs = list(zip(loops, ours, strict=True))
        changed = sum(a != b for a, b in zip(reference, ours[0][0], strict=True))
        changed_half = sum(a != b for a, b in zip(half.loop(task, asked)[0], half.ours(task, asked), strict=True))
        row = {
            "task": name,
            "questions": len(asked),
            "tokens_per_answer": tokens / len(asked),
            "loop_per_second": len(asked) / statistics.median(seconds for _, seconds, _ in loops),
            "ours_per_second": len(asked) / statistics.median(seconds for _, seconds, _ in ours),
            "ratio": statistics.median(a[1] / b[1] for a, b in pairs),
            "cpu_ratio": statistics.median(a[2] / b[2] for a, b in pairs),
            "loop_seconds": [seconds for _, seconds, _ in loops],
            "our_seconds": [seconds for _, seconds, _ in ours],
            "differ_float32": changed / len(asked),
            "differ_bfloat16": changed_half / len(asked),
        }
        rows.append(row)
        print(
            f"{name:<14}{row['tokens_per_answer']:>7.1f}{row['loop_per_second']:>10.1f}{row['ours_per_second']:>10.1f}"
            f"{row['ratio']:>7.2f}{row['cpu_ratio']:>10.2f}{changed:>8}/{len(asked)}{changed_half:>9}/{len(asked)}",
            flush=True,
        )
    tasks = rows[:-2]
    total = [sum(sum(row[key]) for row in tasks) for key in ("loop_seconds", "our_seconds")]
    print(f"all tasks: {total[0] / total[1]:.2f} times the loop's speed")
    prefill = first_pass(full, work[0][1], work[0][2])
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": full.config.evaluation.batch_size,
        "stage": arguments.stage,
        "ratio": total[0] / total[1],
        "rows": rows,
        "first_pass": prefill,
    }
    (arguments.output / "evaluation.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
