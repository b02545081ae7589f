"""2,500 damaged run files and benchmark files, and the bombs that YAML allows."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_cl.config import BenchmarkConfig, RunConfig, load_benchmark, load_config, validate_config
from llava_cl.errors import InputError
from llava_cl.parsing import MAX_YAML_BYTES, parse_yaml
from mutations import JUNK, accepted, damage, fuzz, json_text, mutate

TASK = {"name": "One", "train": "train.json", "test": "test.json", "images": "images", "scorer": "exact"}
BENCHMARK = {
    "name": "s",
    "tasks": [TASK, {**TASK, "name": "Two", "suffix_by_answer": {"x": "y"}, "records": {"train": 3}}],
}
RUN = {
    "extends": "base.yaml",
    "benchmark": {**BENCHMARK, "aliases": {"train": "other"}},
    "model": {"path": "model"},
    "method": {"name": "keeplora", "options": {"energy": 0.9}, "parts": {"text": {"energy": 0.8}}},
    "data_root": "data",
    "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]},
    "training": {"learning_rate": 1e-3, "global_batch": 8, "micro_batch": 2, "per_task": {"One": {"epochs": 2}}},
    "distributed": {"deepspeed": "zero2.json"},
}
# fmt: off
SNIPPETS = (
    "&a ", "*a", "<<: *a", "? ", "- ", ": ", "\t", "{", "[", "|", ">", "#", "\n---\n", "%YAML 9\n", "'", '"', "@", "`",
    "!!bool maybe", "!!int x", "!!float ''", "!!timestamp x", "!!binary '='", "!!null x", "!!set {a}", "!!omap [1]",
    "!x y", "!!python/object/apply:os.system [ls]", "2001-99-99", "1:99:99", "0o9", ".inf", ".nan", "~", "=",
    "9" * 5000, "[" * 100, "{" * 100,
)
# fmt: on
_JUNK = tuple(value for value in JUNK if value not in ("@deep@", "@deeper@"))
"""Deep nesting, at which PyYAML is slow, has a test of its own."""


def make_yaml(good: Any) -> Callable[[random.Random], bytes]:
    block = yaml.safe_dump(good, sort_keys=False)

    def make(choice: random.Random) -> bytes:
        if choice.random() < 0.6:
            content = json_text(mutate(good, choice, choice.randrange(1, 4), _JUNK), choice)
        else:
            lines = block.splitlines(keepends=True)
            for _ in range(choice.randrange(1, 3)):
                at, snippet = choice.randrange(len(lines)), choice.choice(SNIPPETS)
                key, colon, value = lines[at].partition(": ")
                lines[at] = choice.choice([f"{key}: {snippet}\n", f"{key}{colon}{snippet}{value}", snippet + lines[at]])
            content = "".join(lines)
        raw = content.encode("utf-8", "surrogatepass")
        return damage(raw, choice) if choice.random() < 0.1 else raw

    return make


def test_run_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    loaded = []

    def check(content: bytes) -> None:
        file.write_bytes(content)
        config: RunConfig | None = accepted(lambda: load_config(file), file)
        loaded.append(config is not None)
        if config is not None:
            again = validate_config(json.loads(config.model_dump_json()), "run.json")
            assert again == config
            assert config.identity() == again.identity()
            assert config.training.micro_batch_for(1) <= config.training.micro_batch

    check(yaml.safe_dump(RUN).encode())
    assert loaded == [True]
    fuzz(1500, make_yaml(RUN), check)
    assert len(loaded) / 20 < sum(loaded) < len(loaded) / 2


def test_benchmark_files(tmp_path: Path) -> None:
    file = tmp_path / "stream.yaml"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        config: BenchmarkConfig | None = accepted(lambda: load_benchmark(file), file)
        if config is not None:
            assert BenchmarkConfig.model_validate_json(config.model_dump_json()) == config

    fuzz(1000, make_yaml(BENCHMARK), check)


def laughs(levels: int, how: str) -> str:
    """Every level names the one before it nine times."""
    lines = ["a0: &a0 {x0: [1, 2]}"]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * 9)
        value = {"list": f"[{names}]", "merge": f"{{<<: [{names}]}}"}[how]
        lines.append(f"a{level}: &a{level} {value}")
    return "\n".join(lines)


@pytest.mark.parametrize("how", ["list", "merge"])
def test_aliases_that_multiply_are_refused_in_little_memory(how: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(laughs(30, how))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"bomb\.yaml: aliases multiply"):
            load_config(file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(parse_yaml(laughs(3, how), "x")) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: &a [*a]", "an alias within what it names"),
        (b"[" * 50_000, "nested too deeply"),
        (b"a: " * 2, "not valid YAML"),
        (b"name: \xff", r"is not UTF-8 \(byte 6\)"),
        (b"#" * (MAX_YAML_BYTES + 1), "is larger than 1,000,000 bytes"),
        (b"a: 2001-99-99", "not of its type"),
        (b"a: !!bool maybe", "not of its type"),
        (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"extends: [a]", "extends: must be the path of a run file"),
        (b'extends: "\\0"', "cannot be read"),
        (b"extends: ~nobody-of-that-name/run.yaml", "cannot be read"),
    ],
)
def test_what_no_run_file_is(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        load_config(file)
    assert str(tmp_path) in error.value.problems[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('data_root="a\\0b"', "data_root: holds a zero byte"),
        (f"data_root={'a' * 300}", "data_root: is too long"),
        ("lora.alpha=.inf", "lora.alpha: must be finite, is inf"),
        ("training.global_batch=10000000000", "training.global_batch: must be at most 1000000, is 10000000000"),
        (f"name={'a' * 101}", "name: must have at most 100 characters"),
        ("method.options={when: 2001-01-01}", "method.options.when"),
    ],
)
def test_values_that_no_run_could_use(override: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "extends": str(tmp_path / "base.yaml")}))
    (tmp_path / "base.yaml").write_text("seed: 3\n")
    with pytest.raises(InputError) as error:
        load_config(file, [override])
    assert any(problem.startswith(f"{file}: {said}") for problem in error.value.problems), error.value.problems
