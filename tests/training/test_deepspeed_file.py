"""What a DeepSpeed file may say, what the run decides, and what of it a run's result depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_cl.config import RunConfig, load_config
from llava_cl.errors import InputError
from llava_cl.training.deepspeed_file import check_deepspeed, deepspeed_config, result_settings, zero_stage

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ZERO = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8}
OFFLOAD = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "gather_16bit_weights_on_model_save": True,
    },
    "steps_per_print": 1e5,
    "wall_clock_breakdown": False,
}
"""As the files for offloading are that are passed around, without their optimizer and scheduler."""


def _run(tmp_path: Path, content: Any, *overrides: str) -> RunConfig:
    """A run of 16 samples in micro-batches of 8, clipped at 1, in fp32 or as overridden, with a DeepSpeed file."""
    file = tmp_path / "deepspeed.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    own = [f"distributed.deepspeed={file}", "model.dtype=float32", *overrides]
    return load_config(ROOT / "configs/runs/playground_ucit_keeplora.yaml", own)


def _problems(config: RunConfig, ranks: int = 2) -> tuple[str, ...]:
    with pytest.raises(InputError) as error:
        check_deepspeed(config, ranks)
    assert all(problem.startswith(f"{config.distributed.deepspeed}: ") for problem in error.value.problems)
    return error.value.problems


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer: take this section out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: take this section out"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: must be False or 'auto', is true."),
        ({"bf16": {"enabled": True}}, 'bf16.enabled: is True, but the run has False; write "auto".'),
        ({"train_batch_size": 32}, 'train_batch_size: is 32, but the run has 16; write "auto".'),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: is 4, but the run has 8"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: is 2, but the run has 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: is 0.5, but the run has 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping: must be a number or 'auto', is true."),
        ({"train_batch_size": "16"}, "train_batch_size: must be a whole number or 'auto', is '16'."),
        ({"zero_optimisation": ZERO}, "zero_optimisation: unknown key. Did you mean 'zero_optimization'?"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key. Did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag: unknown key. Did you mean 'stage'?"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be a whole number, is true."),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage: must be a whole number, is '2'."),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be at most 3, is 4."),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm: must be true or false or 'auto'"),
        (
            {"zero_optimization": {"reduce_bucket_size": True}},
            "reduce_bucket_size: must be a number or 'auto', is true",
        ),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "reduce_bucket_size: must be a whole number, is 0.5."),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "device: must be 'cpu' or 'none', is 'gpu'."),
        ({"zero_optimization": [ZERO]}, "zero_optimization: must be a mapping of keys to values"),
        ({"communication_data_type": "float16"}, "communication_data_type: must be 'fp32', 'fp16' or 'bf16'"),
        ([ZERO], "the file: must be a mapping of keys to values"),
        ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "'gradient_clipping' is given twice in one object"),
        ("{'a': 1}", "not valid JSON"),
    ],
)
def test_what_a_file_may_not_say(content: Any, said: str, tmp_path: Path) -> None:
    (problem,) = _problems(_run(tmp_path, content))
    assert said in problem


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    problems = _problems(_run(tmp_path, {"optimizer": {}, "scheduler": {}, "zero_optimization": {"a": 1}, "b": 1}))
    assert len(problems) == 4
    fixed = {"train_batch_size": 8, "gradient_clipping": 2, "bf16": {"enabled": False}}
    assert len(_problems(_run(tmp_path, fixed, "model.dtype=bfloat16"))) == 3


@pytest.mark.parametrize(("ranks", "micro", "steps"), [(1, 8, 2), (2, 8, 1), (4, 4, 1)])
def test_values_that_are_those_of_the_run_are_accepted(ranks: int, micro: int, steps: int, tmp_path: Path) -> None:
    fixed = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps, "gradient_clipping": 1}
    check_deepspeed(_run(tmp_path, {**fixed, "train_batch_size": 16, "bf16": {"enabled": False}}), ranks)
    check_deepspeed(_run(tmp_path, {"bf16": {"enabled": True}}, "model.dtype=bfloat16"), ranks)


def test_the_usual_file_for_offloading_is_accepted_and_the_run_decides(tmp_path: Path) -> None:
    config = _run(tmp_path, OFFLOAD)
    check_deepspeed(config, 2)
    made = deepspeed_config(config.distributed.deepspeed, torch.device("cuda"))
    decided = {"zero_force_ds_cpu_optimizer": False}
    assert made == {**{key: value for key, value in OFFLOAD.items() if key != "fp16"}, **decided}
    assert zero_stage(made) == 3
    # What a file leaves out is decided by the run as well, not by DeepSpeed's own defaults.
    (tmp_path / "empty.json").write_text("{}")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    made = deepspeed_config(tmp_path / "empty.json", CPU)
    assert made == {
        **dict.fromkeys(keys, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"overlap_comm": False},
        **decided,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_files_are_accepted_and_say_nothing_that_changes_results(stage: int) -> None:
    file = ROOT / f"configs/deepspeed/zero{stage}.json"
    for dtype in ("float32", "bfloat16"):
        overrides = [f"distributed.deepspeed={file}", f"model.dtype={dtype}"]
        check_deepspeed(load_config(ROOT / "configs/runs/playground_ucit_keeplora.yaml", overrides), 2)
    assert result_settings(file) == {}


def test_what_results_depend_on(tmp_path: Path) -> None:
    assert result_settings(None) is False
    changes = {"communication_data_type": "fp16", "gradient_predivide_factor": 2.0}
    zero = {"zero_quantized_gradients": True, "stage": 3, "reduce_bucket_size": 1e6, "overlap_comm": False}
    config = _run(tmp_path, {**changes, "zero_optimization": zero, "steps_per_print": 5, "data_types": None})
    assert result_settings(config.distributed.deepspeed) == {**changes, "zero_quantized_gradients": True}
