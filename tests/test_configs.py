"""Every shipped run file loads, and the real ones hold the published hyper-parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_cl.config import RunConfig, load_config
from llava_cl.evaluation.scorers import SCORERS
from llava_cl.pipeline.dry_run import describe
from llava_cl.pipeline.orchestrator import Launch

RUNS = Path(__file__).parents[1] / "configs" / "runs"
FILES = sorted(RUNS.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_run_file_loads_and_states_its_command(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert file.read_text().splitlines()[0].startswith(f"# llava-cl run configs/runs/{file.name}")
    assert config.name == file.stem
    assert all(task.scorer in SCORERS for task in config.benchmark.evaluated)
    plan = describe(config, Launch(tmp_path / "run"))
    assert [stage["task"] for stage in plan["stages"]] == [task.name for task in config.benchmark.tasks]
    assert not (tmp_path / "run").exists()


def real(name: str) -> RunConfig:
    return load_config(RUNS / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "rate", "new_tokens"),
    [("ucit_keeplora", 32, 8, 2e-4, 1024), ("dcl_keeplora", 64, 128, 2e-5, 128)],
)
def test_published_hyper_parameters(name: str, rank: int, alpha: float, rate: float, new_tokens: int) -> None:
    config = real(name)
    training = config.training
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (rank, alpha, 0.05)
    assert training.learning_rate == rate
    assert training.projector_learning_rate == 2e-5
    assert (training.global_batch, training.micro_batch) == (4 * 8 * 2, 8)
    assert (training.warmup_ratio, training.scheduler, training.weight_decay) == (0.03, "cosine", 0)
    assert (training.max_grad_norm, training.max_length, training.workers) == (0, 2048, 4)
    assert training.gradient_checkpointing == "auto"
    assert (config.seed, config.model.dtype, config.distributed.ranks) == (42, "bfloat16", 4)
    assert config.distributed.deepspeed is not None
    assert config.distributed.deepspeed.name == "zero2.json"
    assert config.measurement.ratio == 0.2
    assert config.evaluation.max_new_tokens == new_tokens
    assert config.method.options == {
        "weight_energy": 0.6,
        "protect": "gradient",
        "energy": 0.99,
        "initialise": "gradient",
        "b": "zero",
    }


@pytest.mark.parametrize("stream", ["ucit", "dcl"])
def test_the_papers_text_protects_features_beside_the_weights(stream: str) -> None:
    paper, code = real(f"{stream}_keeplora_paper"), real(f"{stream}_keeplora")
    assert paper.method.options == {**code.method.options, "protect": "feature"}
    assert paper.training == code.training
    assert real(f"playground_{stream}_keeplora_paper").method == paper.method


@pytest.mark.parametrize(("name", "rank", "rate"), [("ucit_sequential", 16, 2e-4), ("dcl_sequential", 32, 2e-5)])
def test_published_baseline(name: str, rank: int, rate: float) -> None:
    config, keeplora = real(name), real(name.replace("sequential", "keeplora"))
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (rank, 2 * rank, 0.05)
    assert [config.learning_rate(task.name) for task in config.benchmark.tasks] == [rate] * len(config.benchmark.tasks)
    assert config.training.micro_batch == 4
    assert config.method.name == "sequential"
    tasks = config.benchmark.tasks
    assert [config.epochs(task.name) for task in tasks] == [keeplora.epochs(task.name) for task in tasks]
    same = {"micro_batch", "per_task"}
    assert config.training.model_dump(exclude=same) == keeplora.training.model_dump(exclude=same)
    assert (config.benchmark, config.evaluation, config.seed) == (keeplora.benchmark, keeplora.evaluation, 42)


def test_published_task_order_epochs_and_rates() -> None:
    ucit, dcl = real("ucit_keeplora"), real("dcl_keeplora")
    assert [task.name for task in ucit.benchmark.tasks] == [
        "ImageNet-R",
        "ArxivQA",
        "VizWiz",
        "IconQA",
        "CLEVR-Math",
        "Flickr30k",
    ]
    assert [ucit.learning_rate(task.name) for task in ucit.benchmark.tasks] == [2e-4] * 5 + [1e-4]
    assert [ucit.epochs(task.name) for task in ucit.benchmark.tasks] == [1] * 6
    assert [task.name for task in dcl.benchmark.tasks] == ["RS", "Med", "AD", "Sci", "Fin"]
    assert [dcl.epochs(task.name) for task in dcl.benchmark.tasks] == [1, 3, 1, 2, 1]
    assert [dcl.learning_rate(task.name) for task in dcl.benchmark.tasks] == [2e-5] * 5


def test_playground_differs_from_the_real_run_in_data_only() -> None:
    """Same keys, same method, same kind of job: nothing in the run file chooses another path through the code."""
    playground, ucit = load_config(RUNS / "playground_ucit_keeplora.yaml"), real("ucit_keeplora")
    assert playground.method == ucit.method
    assert playground.model.family == ucit.model.family
    assert playground.distributed.deepspeed == ucit.distributed.deepspeed
    assert len(playground.benchmark.tasks) == len(ucit.benchmark.tasks) == 6
    assert len(load_config(RUNS / "playground_dcl_keeplora.yaml").benchmark.tasks) == 5


def test_the_stream_of_the_readme_loads(tmp_path: Path) -> None:
    text = (RUNS.parents[1] / "README.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "mine.yaml"
    file.write_text(example.replace("ucit_keeplora.yaml", str(RUNS / "ucit_keeplora.yaml")))
    config = load_config(file)
    assert [task.name for task in config.benchmark.tasks] == ["Receipts", "Plants"]
    describe(config, Launch(tmp_path / "run"))
