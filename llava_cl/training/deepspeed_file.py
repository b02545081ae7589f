"""The DeepSpeed file of a run: how ranks share memory and exchange gradients; everything else the run file decides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, create_model

from llava_cl.config import RunConfig, Section, checked
from llava_cl.errors import InputError, problems_of
from llava_cl.parsing import MAX_YAML_BYTES, parse_json, read_text

_AUTO: Any = Literal["auto"]
_Whole = Annotated[float, Field(ge=0, multiple_of=1)]
_Floats = Literal["fp32", "fp16", "bf16"]
_BF16: Any = dict[Literal["enabled"], bool | _AUTO]
_DATA_TYPES: Any = dict[Literal["grad_accum_dtype"], _Floats]
# fmt: off
_FLAGS = (
    "contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm", "round_robin_gradients",
    "use_multi_rank_bucket_allreduce", "load_from_fp32_weights", "ignore_unused_parameters", "memory_efficient_linear",
    "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
)
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_STAGE3_FLAGS = ("gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params")
_SIZES = ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")
_STAGE3_SIZES = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "module_granularity_threshold",
)
_SWITCHES = (
    "prescale_gradients", "wall_clock_breakdown", "memory_breakdown", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# fmt: on
_RESULT = {
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "data_types"),
    *(*_QUANTIZED, "zero_hpz_partition_size"),
}


class _Offload(Section):
    device: Literal["cpu", "none"]
    pin_memory: bool = False
    buffer_count: int = 4
    buffer_size: _Whole = 0
    max_in_cpu: _Whole = 0
    fast_init: bool = False


def _fields(kind: Any, names: tuple[str, ...], stage3: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of one type; DeepSpeed takes those of stage 3 under two names."""
    return dict.fromkeys([*names, *stage3, *(f"stage3_{name}" for name in stage3)], (kind, None))


_Zero: Any = create_model(
    "_Zero",
    __base__=Section,
    stage=(Annotated[int, Field(ge=0, le=3)], 0),
    offload_param=(_Offload | None, None),
    offload_optimizer=(_Offload | None, None),
    zero_hpz_partition_size=(Annotated[int, Field(ge=1)], 1),
    **_fields(bool | _AUTO, _FLAGS + _QUANTIZED, _STAGE3_FLAGS),
    **_fields(_Whole | _AUTO, _SIZES, _STAGE3_SIZES),
)


class _Off(Section, extra="ignore"):
    enabled: Literal[False, "auto"] = False


_DECIDED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_File: Any = create_model(
    "_File",
    __base__=Section,
    zero_optimization=(_Zero, _Zero()),
    fp16=(_Off, _Off()),
    bf16=(_BF16, {}),
    communication_data_type=(_Floats | None, None),
    data_types=(_DATA_TYPES, {}),
    gradient_predivide_factor=(Annotated[float, Field(gt=0)], 1.0),
    steps_per_print=(_Whole, 10),
    **_fields(int | _AUTO, _DECIDED[:3]),
    **_fields(float | _AUTO, _DECIDED[3:]),
    **_fields(bool, _SWITCHES),
)
_OWN = ("optimizer", "scheduler")


def _read(path: Path) -> dict[str, Any]:
    content = parse_json(read_text(path, limit=MAX_YAML_BYTES), str(path), unique=True)
    problems = [
        f"{path}: {key}: take this section out; the run file decides (training.*)."
        for key in _OWN
        if isinstance(content, dict) and content.pop(key, None) is not None
    ]
    problems += problems_of(lambda: checked(_File, content, lambda key: f"{path}: {key or 'the file'}"))
    if problems:
        raise InputError(*problems)
    return {key: value for key, value in content.items() if value is not None}


def deepspeed_config(path: Path | None, device: torch.device) -> dict[str, Any] | None:
    """The DeepSpeed configuration of a file, with what the run decides and a CPU needs; None without a file.

    Raises:
        InputError: the file cannot be read, has wrong or unknown settings, or some that only the run file may have.
    """
    if path is None:
        return None
    content = _read(path) | dict.fromkeys(_DECIDED, "auto") | {"bf16": {"enabled": "auto"}}
    content.pop("fp16", None)
    # The optimizer is torch's; otherwise DeepSpeed asks for its own where it is offloaded.
    content["zero_force_ds_cpu_optimizer"] = False
    zero = content["zero_optimization"] = dict(content.get("zero_optimization", {}))
    if device.type == "cpu":
        zero["overlap_comm"] = False
        if zero.get("reduce_bucket_size") == "auto":
            zero["reduce_bucket_size"] = 5_000_000
    return content


def check_deepspeed(config: RunConfig, ranks: int) -> None:
    """Checks a run's DeepSpeed file.

    Raises:
        InputError: as `deepspeed_config`, or a value that is another than the run's.
    """
    if config.distributed.deepspeed is None:
        return
    content, training = _read(config.distributed.deepspeed), config.training
    micro = training.micro_batch_for(ranks)
    wanted = (training.global_batch, micro, training.global_batch // micro // ranks, training.max_grad_norm)
    decided = {key: (content.get(key, "auto"), value) for key, value in zip(_DECIDED, wanted, strict=True)}
    decided["bf16.enabled"] = (content.get("bf16", {}).get("enabled", "auto"), config.model.dtype == "bfloat16")
    problems = [
        f'{config.distributed.deepspeed}: {key}: is {given}, but the run has {value}; write "auto".'
        for key, (given, value) in decided.items()
        if given not in ("auto", value)
    ]
    if problems:
        raise InputError(*problems)


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration, 0 without one."""
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def result_settings(path: Path | None) -> dict[str, Any] | bool:
    """What of a DeepSpeed file a run's result depends on; False without a file.

    ZeRO stage, buckets and offloading move the same sums to other places; types and rounding of what ranks send do not.

    Raises:
        InputError: as `deepspeed_config`.
    """
    if path is None:
        return False
    content = _read(path)
    found = {**content, **content.get("zero_optimization", {})}
    return {key: value for key, value in found.items() if key in _RESULT and value not in ("auto", False)}
