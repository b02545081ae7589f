"""Run files: inheritance, relative paths, overrides, and problems told all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_cl.config import (
    DistributedConfig,
    EvaluationConfig,
    ImagesConfig,
    MeasurementConfig,
    RunConfig,
    TrainingConfig,
    apply_overrides,
    load_benchmark,
    load_config,
    validate_config,
)
from llava_cl.config.loading import _names_beside
from llava_cl.errors import InputError
from llava_cl.parsing import parse_yaml


def _content(**changes: Any) -> dict[str, Any]:
    """A complete run file."""
    task = {"train": "train.json", "test": "test.json", "images": "images", "scorer": "exact"}
    return {
        "benchmark": {"name": "stream", "tasks": [{"name": "One", **task}, {"name": "Two", **task}]},
        "model": {"path": "model"},
        "method": {"name": "keeplora", "options": {"energy": 0.9}},
        "data_root": "data",
        "lora": {"rank": 4, "alpha": 8},
        "training": {"learning_rate": 1e-3, "global_batch": 8, "micro_batch": 2},
        **changes,
    }


def _write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _write(tmp_path / "runs" / "base.yaml", _content())


def _problems(file: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        load_config(file, overrides)
    return error.value.problems


def test_name_is_the_files_unless_given(base: Path) -> None:
    assert load_config(base).name == "base"
    assert load_config(_write(base.with_name("b.yaml"), _content(name="own"))).name == "own"


def test_a_file_extends_another_section_by_section(base: Path) -> None:
    child = _write(base.with_name("child.yaml"), {"extends": "base.yaml", "training": {"epochs": 3}, "seed": 7})
    config, inherited = load_config(child), load_config(base)
    assert (config.training.epochs, config.seed, config.name) == (3, 7, "child")
    assert config.training.learning_rate == inherited.training.learning_rate
    assert config.lora == inherited.lora
    grandchild = _write(base.with_name("grandchild.yaml"), {"extends": "child.yaml", "training": {"micro_batch": 4}})
    assert load_config(grandchild).training == config.training.model_copy(update={"micro_batch": 4})


def test_sections_may_stand_in_files_of_their_own(tmp_path: Path) -> None:
    content = _content()
    for section in ("benchmark", "model", "method"):
        _write(tmp_path / section / "file.yaml", content[section])
        content[section] = f"../{section}/file.yaml"
    config = load_config(_write(tmp_path / "runs" / "run.yaml", content))
    assert [task.name for task in config.benchmark.tasks] == ["One", "Two"]
    assert config.model.path == tmp_path / "model" / "model"
    assert config.method.options == {"energy": 0.9}


def test_a_section_of_a_file_replaces_the_inherited_one_whole(base: Path) -> None:
    """The options of one method are not options of another."""
    _write(base.with_name("sequential.yaml"), {"name": "sequential"})
    child = _write(base.with_name("child.yaml"), {"extends": "base.yaml", "method": "sequential.yaml"})
    config = load_config(child)
    assert (config.method.name, config.method.options) == ("sequential", {})


def test_options_given_inline_are_added_to_the_inherited_ones(base: Path) -> None:
    child = {"extends": "base.yaml", "method": {"options": {"b": "gradient"}}}
    assert load_config(_write(base.with_name("child.yaml"), child)).method.options == {"energy": 0.9, "b": "gradient"}


def test_null_removes_an_inherited_section(base: Path) -> None:
    middle = {"extends": "base.yaml", "training": {"per_task": {"One": {"epochs": 9}}}}
    _write(base.with_name("middle.yaml"), middle)
    child = _write(base.with_name("child.yaml"), {"extends": "middle.yaml", "training": {"per_task": None}})
    assert load_config(child).epochs("One") == 1


def test_a_file_that_extends_itself_is_refused(base: Path) -> None:
    _write(base, _content(extends="other.yaml"))
    _write(base.with_name("other.yaml"), {"extends": "base.yaml"})
    (problem,) = _problems(base)
    assert "extends itself through base.yaml -> other.yaml" in problem


def test_paths_are_relative_to_the_file_that_states_them(base: Path, tmp_path: Path) -> None:
    child = _write(
        tmp_path / "elsewhere" / "deep" / "child.yaml",
        {"extends": "../../runs/base.yaml", "distributed": {"deepspeed": "zero2.json"}},
    )
    config = load_config(child)
    assert config.data_root == tmp_path / "runs" / "data"
    assert config.model.path == tmp_path / "runs" / "model"
    assert config.distributed.deepspeed == child.parent / "zero2.json"


def test_home_and_absolute_paths_stay(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _write(base, _content(data_root="~/data", model={"path": "/models/llava"}))
    config = load_config(base)
    assert config.data_root == tmp_path / "home" / "data"
    assert config.model.path == Path("/models/llava")


def test_overrides_are_yaml_and_their_paths_relative_to_the_working_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        base,
        ["training.epochs=2", "model.path=here", "training.projector_learning_rate=null", "method.options={b: zero}"],
    )
    assert config.training.epochs == 2
    assert config.model.path == tmp_path / "here"
    assert config.data_root == base.parent / "data"
    assert config.training.projector_learning_rate is None
    assert config.method.options == {"energy": 0.9, "b": "zero"}


def test_an_override_may_name_a_sections_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "methods" / "sequential.yaml", {"name": "sequential"})
    monkeypatch.chdir(tmp_path)
    config = load_config(base, ["method=methods/sequential.yaml"])
    assert (config.method.name, config.method.options) == ("sequential", {})


def test_later_overrides_win_and_the_original_is_untouched() -> None:
    content = {"a": {"b": 1}}
    assert apply_overrides(content, ["a.b=2", "a.c=x=y", "a.b=3", "d="]) == {"a": {"b": 3, "c": "x=y"}, "d": ""}
    assert content == {"a": {"b": 1}}


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training.epochs=[1", ""])
def test_a_malformed_override_is_named(base: Path, override: str) -> None:
    (problem,) = _problems(base, override)
    assert problem.startswith(f"--set {override}: ")


def test_an_override_below_a_plain_value_is_refused(base: Path) -> None:
    (problem,) = _problems(base, "seed.x=3")
    assert "seed" in problem


def test_all_problems_are_told_at_once_with_their_keys(base: Path) -> None:
    content = _content(extra=1)
    content["training"] = {"learning_rate": -1, "global_batch": 8, "micro_bach": 2}
    del content["model"]
    content["benchmark"]["tasks"][1]["scorer_name"] = "exact"
    problems = _problems(_write(base, content))
    wanted = {
        "extra: unknown key",
        "training.learning_rate: ",
        "training.micro_batch: ",
        "training.micro_bach: unknown key",
        "model: ",
        "benchmark.tasks.1.scorer_name: unknown key",
    }
    assert len(problems) == len(wanted)
    for problem in problems:
        assert problem.startswith(f"{base}: ")
    for key in wanted:
        assert any(problem.startswith(f"{base}: {key}") for problem in problems), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {**_content()["training"], "per_task": {"Three": {"epochs": 1}}}}, "no task.*Three"),
        ({"benchmark": {"name": "b", "tasks": [_content()["benchmark"]["tasks"][0]] * 2}}, "must differ, doubled: One"),
        ({"benchmark": {"name": "b", "tasks": []}}, r"benchmark\.tasks"),
        ({"name": "../up"}, "name"),
        ({"lora": {"rank": 0, "alpha": 1}}, r"lora\.rank"),
    ],
)
def test_values_that_make_no_run_are_refused(base: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_config(_write(base, _content(**changes)))


def test_a_task_without_train_file_is_refused_but_a_probe_may_lack_one(base: Path) -> None:
    content = _content()
    probe = {**content["benchmark"]["tasks"][0], "name": "Probe"}
    del probe["train"]
    content["benchmark"]["probes"] = [probe]
    assert [task.name for task in load_config(_write(base, content)).benchmark.probes] == ["Probe"]
    content["benchmark"]["tasks"].append({**probe, "name": "Three"})
    with pytest.raises(InputError, match="without a train file: Three"):
        load_config(_write(base, content))


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be read"), ("a: [1", "not valid YAML"), ("- 1\n", "expected a mapping"), ("", "mapping")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    (problem,) = _problems(file)
    assert problem.startswith(f"{file}: ")
    assert said in problem


def test_a_missing_section_file_is_named(base: Path) -> None:
    (problem,) = _problems(_write(base, _content(method="methods/nowhere.yaml")))
    assert problem.startswith(f"{base.parent / 'methods' / 'nowhere.yaml'}: cannot be read")


def test_epochs_and_learning_rate_of_a_task(base: Path) -> None:
    content = _content()
    content["training"] |= {"epochs": 2, "per_task": {"Two": {"learning_rate": 5e-4}}}
    config = load_config(_write(base, content))
    assert [config.epochs(task) for task in ("One", "Two")] == [2, 2]
    assert [config.learning_rate(task) for task in ("One", "Two")] == [1e-3, 5e-4]
    assert config.task(2).name == "Two"


def test_a_dumped_configuration_validates_to_itself(base: Path) -> None:
    """The jobs of a run read the configuration from `run.json`."""
    config = load_config(base)
    assert validate_config(config.model_dump(mode="json"), "run.json") == config


def _identity(base: Path, *overrides: str) -> dict[str, Any]:
    return load_config(base, overrides).identity()


@pytest.mark.parametrize(
    "override",
    [
        "data_root=/elsewhere",
        "model.path=/elsewhere",
        "distributed.ranks=4",
        "training.workers=3",
        "measurement.sums=2.5",
    ],
)
def test_identity_does_not_depend_on_places_and_speed(base: Path, override: str) -> None:
    assert _identity(base) == _identity(base, override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "lora.rank=5",
        "method.options.energy=0.8",
        "training.learning_rate=0.1",
        "training.global_batch=16",
        "measurement.ratio=0.5",
        "measurement.sketch=64",
        "evaluation.max_new_tokens=5",
        "model.dtype=float32",
        "model.merged_dtype=float32",
        "deterministic=true",
    ],
)
def test_identity_depends_on_what_changes_the_result(base: Path, override: str) -> None:
    assert _identity(base) != _identity(base, override)


def test_every_documented_field_exists_with_its_default() -> None:
    config = RunConfig.model_validate({**_content(), "name": "defaults"})
    assert (config.seed, config.deterministic, config.model.dtype, config.training.epochs) == (42, False, "bfloat16", 1)
    assert (config.measurement.ratio, config.evaluation.zero_shot, config.distributed.deepspeed) == (0.2, True, None)


QUOTES = "Put it in quotes if it is meant as text."
BOOLEANS = "In YAML yes, no, on and off are booleans, too."


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rate=on", f"training.learning_rate: must be a number, is true. {BOOLEANS}"),
        ("unmatched_limit=on", f"unmatched_limit: must be a number, is true. {BOOLEANS}"),
        ("training.epochs=yes", f"training.epochs: must be a whole number, is true. {BOOLEANS}"),
        ("training.epochs=2.0", "training.epochs: must be a whole number, is 2.0."),
        ("seed=no", f"seed: must be a whole number, is false. {BOOLEANS}"),
        ("seed='3'", "seed: must be a whole number, is '3'."),
        ("lora.rank=true", f"lora.rank: must be a whole number, is true. {BOOLEANS}"),
        ("lora.alpha='8'", "lora.alpha: must be a number, is '8'."),
        ("lora.targets=[]", "lora.targets: must have at least 1 entries, is []."),
        ("lora.targets=[on]", f"lora.targets.0: must be text, is true. {QUOTES}"),
        ("lora.targets=q_proj", "lora.targets: must be a list, is 'q_proj'."),
        ("name=123", f"name: must be text, is 123. {QUOTES}"),
        ("name=2024-01-31", f"name: must be text, is datetime.date(2024, 1, 31). {QUOTES}"),
        ("data_root=12", f"data_root: must be a path, is 12. {QUOTES}"),
        ("model.path=off", f"model.path: must be a path, is false. {QUOTES}"),
        ("model.cosine_heads=1", "model.cosine_heads: must be true or false, is 1."),
        (
            "model.truncate={vision: {q_proj: on}}",
            f"model.truncate.vision.q_proj: must be a number, is true. {BOOLEANS}",
        ),
        ("images.resize=[8, yes]", f"images.resize.1: must be a whole number, is true. {BOOLEANS}"),
        ("images.resize=[8, 8, 8]", "images.resize: must have at most 2 entries, is [8, 8, 8]."),
        ("images.resize=big", "images.resize: must be a whole number or a list, is 'big'."),
        ("measurement.sums=on", f"measurement.sums: must be 'device' or 'host' or a number, is true. {BOOLEANS}"),
        ("measurement.sums=-1", "measurement.sums: must be more than 0, is -1."),
        ("evaluation.split=off", f"evaluation.split: must be 'test' or 'validation', is false. {BOOLEANS}"),
        ("training.scheduler=cosin", "'steps' or 'one_cycle', is 'cosin'. Did you mean 'cosine'?"),
        ("training.per_task={One: {epochs: yes}}", "training.per_task.One.epochs: must be a whole number, is true."),
        ("training.per_task={One: {epoch: 1}}", "training.per_task.One.epoch: unknown key. Did you mean 'epochs'?"),
        ("training.per_task={on: {epochs: 1}}", f"training.per_task.true (a key): must be text, is true. {QUOTES}"),
        ("training.per_task={Onee: {epochs: 1}}", "no task of the benchmark: Onee. Did you mean 'One'?"),
        ("training.micro_bach=1", "training.micro_bach: unknown key. Did you mean 'micro_batch'?"),
        ("benchmark.aliases={Colour: /abs}", "'/abs' must be relative to data_root, and below it"),
        ("benchmark.aliases={a: b/../../c}", "'b/../../c' must be relative to data_root, and below it"),
        ("benchmark.evaluate=no", f"benchmark.evaluate: must be 'all' or 'seen', is false. {BOOLEANS}"),
    ],
)
def test_types_are_strict_and_told_in_the_users_words(base: Path, override: str, said: str) -> None:
    (problem,) = _problems(base, override)
    assert said in problem
    assert "Input should" not in problem


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"classes": "[no, yes]"}, f"classes.0: must be text or a whole number, is false. {QUOTES}"),
        ({"classes": "[1.0, 2.0]"}, f"classes.0: must be text or a whole number, is 1.0. {QUOTES}"),
        ({"classes": "true"}, f"classes: must be a whole number or a list, is true. {BOOLEANS}"),
        ({"classes": "1"}, "classes: must be at least 2, is 1."),
        ({"classes": "[a]"}, "classes: must have at least 2 entries, is ['a']."),
        ({"classes": "[../a, b]"}, "'../a' must be the name of a folder"),
        ({"classes": "[a, b]", "names": "{no: x}"}, f"names.false (a key): must be text, is false. {QUOTES}"),
        ({"classes": "[a, b]", "template": "on"}, f"template: must be text, is true. {QUOTES}"),
        ({"classes": "[a, b]", "train": "../x"}, "'../x' must be relative to data_root, and below it"),
        ({"classes": "[a, b]", "records": "{test: on}"}, f"records.test: must be a whole number, is true. {BOOLEANS}"),
        ({"images": "i", "scorer": "exact", "suffix_by_answer": "{yes: x}"}, "suffix_by_answer.true (a key): must be"),
        ({"images": "i", "scorer": "exact", "references": "a/../../r"}, "'a/../../r' must be relative to data_root"),
    ],
)
def test_a_benchmark_file_is_as_strict(fields: dict[str, str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "stream.yaml"
    lines = [f"    {key}: {value}\n" for key, value in {"train": "a", "test": "b", **fields}.items()]
    file.write_text(f"name: stream\ntasks:\n  - name: One\n{''.join(lines)}")
    with pytest.raises(InputError) as error:
        load_benchmark(file)
    assert f"{file}: benchmark." not in str(error.value)
    assert any(said in problem for problem in error.value.problems), error.value.problems


def test_names_of_classes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "names.json").write_text('{"a": true}')
    with pytest.raises(InputError, match=r"names\.json: 'a': a class folder and its name must both be strings"):
        _names_beside(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.e3", -2e3),
        (".5e1", 5.0),
        ("1.5e+3", 1500.0),
        ("+5", 5),
        ("0", 0),
        ("-0.5", -0.5),
    ],
)
def test_numbers_as_they_are_usually_written(text: str, value: float) -> None:
    read = parse_yaml(f"a: {text}", "x")["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["0100", "08", "-010", "1:30", "1:30.5", "0x1f", "0b1", "1_000", "01.5", "!!int '0100'"]
)
def test_numbers_that_can_be_read_in_two_ways_are_refused_with_their_line(base: Path, text: str) -> None:
    base.write_text(f"{base.read_text()}\nseed: {text}\n")
    (problem,) = _problems(base)
    line = base.read_text().count("\n")
    assert f"{base}: not valid YAML: line {line}: " in problem
    assert "write plain digits, or text in quotes" in problem


@pytest.mark.parametrize("text", ["training: {epochs: 2}", "training: {}", "'training': {}"])
def test_a_key_given_twice_is_refused_with_its_line(base: Path, text: str) -> None:
    base.write_text(f"{base.read_text()}\n{text}\n")
    (problem,) = _problems(base)
    assert f"line {base.read_text().count(chr(10))}: 'training' is given twice in one mapping; keep one" in problem
    with pytest.raises(InputError, match="line 1: 'a' is given twice"):
        parse_yaml("[{b: 1, a: 1, a: 2}]", "x")
    assert parse_yaml("a: &a {k: 1}\nb: {<<: *a, k: 2}\nc: {k: 3}", "x")["b"] == {"k": 2}


NULLS = {
    "benchmark.aliases": {},
    "benchmark.probes": (),
    "method.options": {},
    "method.parts": {},
    "model.truncate": {},
    "training.per_task": {},
    "training.milestones": (),
    "images": ImagesConfig(),
    "measurement": MeasurementConfig(),
    "evaluation": EvaluationConfig(),
    "distributed": DistributedConfig(),
}


@pytest.mark.parametrize("key", NULLS)
def test_null_over_a_section_that_is_not_there_is_as_if_it_were_not_given(base: Path, key: str) -> None:
    content = _content(method={"name": "sequential"})
    child = _write(base, content).with_name("child.yaml")
    nested: Any = None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    config: Any = load_config(_write(child, {"extends": "base.yaml", **nested}))
    for part in key.split("."):
        config = getattr(config, part)
    assert config == NULLS[key]


def test_null_within_a_mapping_of_mappings_is_as_if_it_were_not_given(base: Path) -> None:
    assert load_config(base, ["training.per_task.One=null"]).training.per_task == {}
    assert load_config(base, ["method.parts.vision=null"]).method.parts == {}
    assert load_config(base, ["method.options.weight_energy=null"]).method.options["weight_energy"] is None
    assert "is null" in _problems(base, "training.epochs=null")[0]


def test_a_benchmark_with_own_tasks_replaces_the_inherited_one_as_a_whole(base: Path) -> None:
    content = _content()
    task = content["benchmark"]["tasks"][0]
    content["benchmark"] |= {
        "description": "of the parent",
        "probes": [{**task, "name": "Probe"}],
        "aliases": {"a": "b"},
    }
    child = _write(base, content).with_name("child.yaml")
    own = {"name": "mine", "tasks": [{**task, "name": "Own"}]}
    benchmark = load_config(_write(child, {"extends": "base.yaml", "benchmark": own})).benchmark
    assert (benchmark.probes, benchmark.aliases, benchmark.description) == ((), {}, "")
    assert [each.name for each in benchmark.tasks] == ["Own"]
    kept = load_config(_write(child, {"extends": "base.yaml", "benchmark": {"name": "renamed"}})).benchmark
    assert (kept.name, len(kept.tasks), len(kept.probes), kept.description) == ("renamed", 2, 1, "of the parent")


def test_another_method_has_none_of_the_inherited_options(base: Path) -> None:
    child = base.with_name("child.yaml")
    own = {"extends": "base.yaml", "method": {"name": "splitlora", "options": {"alpha": 2}}}
    assert load_config(_write(child, own)).method.options == {"alpha": 2}
    for order in (
        ["method.name=splitlora", "method.options.alpha=2"],
        ["method.options.alpha=2", "method.name=splitlora"],
    ):
        assert load_config(base, order).method.options == {"alpha": 2}
    same = {"extends": "base.yaml", "method": {"name": "keeplora", "options": {"b": "gradient"}}}
    assert load_config(_write(child, same)).method.options == {"energy": 0.9, "b": "gradient"}


@pytest.mark.parametrize(
    ("configured", "ranks", "expected"),
    [
        ((16, 8), 1, 8),
        ((16, 8), 2, 8),
        ((16, 8), 4, 4),
        ((16, 6), 1, 4),
        ((24, 8), 2, 6),
        ((64, 8), 8, 8),
        ((14, 7), 2, 7),
    ],
)
def test_the_micro_batch_divides_the_share_of_a_rank(configured: tuple[int, int], ranks: int, expected: int) -> None:
    """Computed by hand: the largest divisor of global batch / ranks that is at most the configured one."""
    training = TrainingConfig(learning_rate=1, global_batch=configured[0], micro_batch=configured[1])
    assert training.micro_batch_for(ranks) == expected


def test_ranks_that_cannot_share_the_global_batch_are_refused() -> None:
    with pytest.raises(InputError, match="3 ranks cannot share 16 samples evenly"):
        TrainingConfig(learning_rate=1, global_batch=16, micro_batch=8).micro_batch_for(3)
