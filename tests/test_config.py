"""Run files: inheritance, relative paths, overrides, and problems told all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_cl.config import RunConfig, apply_overrides, load_config, validate_config
from llava_cl.errors import InputError


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
    ],
)
def test_identity_depends_on_what_changes_the_result(base: Path, override: str) -> None:
    assert _identity(base) != _identity(base, override)


def test_every_documented_field_exists_with_its_default() -> None:
    config = RunConfig.model_validate({**_content(), "name": "defaults"})
    assert (config.seed, config.model.dtype, config.training.epochs) == (42, "bfloat16", 1)
    assert (config.measurement.ratio, config.evaluation.zero_shot, config.distributed.deepspeed) == (0.2, True, None)
