"""The run configuration: what it can say, and how it is read."""

from llava_cl.config.benchmark import AnyTask, BenchmarkConfig, ClassTaskConfig, Part, TaskConfig
from llava_cl.config.loading import apply_overrides, load_benchmark, load_config, shipped_benchmarks, validate_config
from llava_cl.config.schema import (
    DistributedConfig,
    EvaluationConfig,
    ImagesConfig,
    LoraConfig,
    MeasurementConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    TaskTraining,
    TrainingConfig,
)
from llava_cl.config.section import Section, checked

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
    "Section",
    "TaskConfig",
    "TaskTraining",
    "TrainingConfig",
    "apply_overrides",
    "checked",
    "load_benchmark",
    "load_config",
    "shipped_benchmarks",
    "validate_config",
]
