"""The run configuration: what it can say, and how it is read."""

from llava_cl.config.loading import apply_overrides, load_benchmark, load_config, shipped_benchmarks, validate_config
from llava_cl.config.schema import (
    AnyTask,
    BenchmarkConfig,
    ClassTaskConfig,
    DistributedConfig,
    EvaluationConfig,
    ImagesConfig,
    LoraConfig,
    MeasurementConfig,
    MethodConfig,
    ModelConfig,
    Part,
    RunConfig,
    TaskConfig,
    TaskTraining,
    TrainingConfig,
)

__all__ = [
    "AnyTask",
    "BenchmarkConfig",
    "ClassTaskConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ImagesConfig",
    "LoraConfig",
    "MeasurementConfig",
    "MethodConfig",
    "ModelConfig",
    "Part",
    "RunConfig",
    "TaskConfig",
    "TaskTraining",
    "TrainingConfig",
    "apply_overrides",
    "load_benchmark",
    "load_config",
    "shipped_benchmarks",
    "validate_config",
]
