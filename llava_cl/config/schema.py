"""What a run configuration can say: its sections, their defaults, and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from llava_cl.errors import InputError
from llava_cl.parsing import shown

_LONGEST_PATH, _LONGEST_NAME = 1024, 255
_NOT_IDENTITY = (
    ("", "name"),
    ("", "data_root"),
    ("", "distributed"),
    ("", "unmatched_limit"),
    ("", "report_to"),
    ("model", "path"),
    ("model", "vision_tower"),
    ("model", "attention"),
    ("training", "micro_batch"),
    ("training", "workers"),
    ("training", "checkpoint_every"),
    ("training", "gradient_checkpointing"),
    ("measurement", "batch_size"),
    ("measurement", "sums"),
    ("evaluation", "batch_size"),
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Path = TypeVar("_Path", str, Path)


def _usable(path: _Path) -> _Path:
    """A path that every system call takes; where one does not, Python raises other errors than for a missing file."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which no path can") from error
    if b"\0" in name:
        raise ValueError("holds a zero byte, which no path can")
    if len(name) > _LONGEST_PATH or max(map(len, name.split(b"/"))) > _LONGEST_NAME:
        raise ValueError(f"is too long for a path: {_LONGEST_PATH} bytes, {_LONGEST_NAME} between slashes, are allowed")
    return path


_Name = Annotated[str, AfterValidator(_usable)]
_Place = Annotated[Path, AfterValidator(_usable)]
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
_Count = Annotated[int, Field(gt=0, le=1_000_000)]


_TASK_PATHS = ("train", "test", "validation", "images", "references", "validation_references")
Part = Literal["train", "test", "validation"]


class _Task(_Section):
    name: _Label
    train: _Name | None = None
    test: _Name
    validation: _Name | None = None
    records: dict[Part, int] = {}

    @field_validator(*_TASK_PATHS, check_fields=False)
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        if value is not None and Path(value).is_absolute():
            raise ValueError(f"{shown(value)} must be relative to data_root")
        return value

    def paths(self) -> dict[str, str]:
        """The paths below the data root that are given, by field."""
        return {field: getattr(self, field) for field in _TASK_PATHS if getattr(self, field, None) is not None}


class TaskConfig(_Task):
    """One task of instructions. File paths are relative to the data root.

    `suffix` is added to every question; `suffix_by_answer` replaces it where the reference answer is the key.
    `records` says how many records there should be (`{train: 40000, test: 3000}`); another number is only told.
    """

    images: _Name
    scorer: str
    references: _Name | None = None
    validation_references: _Name | None = None
    suffix: str = ""
    suffix_by_answer: dict[str, str] = {}


class ClassTaskConfig(_Task):
    """One task of image classes: `train` and `test` are folders with a folder of images for each class.

    `classes` lists class folders by name, or by their place among all of them in order (0 = the first; folders named by
    numbers are ordered as numbers), or is how many there are, where the task has all. A class is called as its folder
    is, with spaces for underscores, or as the file `names.json` beside the training folder says, or as `names` does.
    `template` makes a sentence of the name for a model that reads.
    """

    classes: Annotated[int, Field(ge=2)] | Annotated[tuple[_Name | int, ...], Field(min_length=2)]
    names: dict[str, str] = {}
    template: str = "a photo of a {}."
    scorer: Literal["exact"] = "exact"

    @model_validator(mode="after")
    def _usable(self) -> ClassTaskConfig:
        if not isinstance(self.classes, int) and len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is listed twice")
        if "{}" not in self.template:
            raise ValueError("template: {} is missing, which stands for the name of the class")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """The class folders' names, in the order of the labels.

        Raises:
            InputError: they are not known, because the training folder is not there.
        """
        if isinstance(self.classes, int) or not all(isinstance(name, str) for name in self.classes):
            raise InputError(f"benchmark task {self.name}: the folder of its classes, {self.train}, is missing.")
        return tuple(map(str, self.classes))

    def class_names(self) -> list[str]:
        """What the classes are called."""
        return [self.names.get(folder, folder.replace("_", " ")) for folder in self.folders]


KINDS = ("instructions", "classes")
"""Of tasks."""


def _kind(task: Any) -> str:
    classes = "classes" in task if isinstance(task, Mapping) else isinstance(task, ClassTaskConfig)
    return KINDS[classes]


AnyTask = Annotated[
    Annotated[TaskConfig, Tag(KINDS[0])] | Annotated[ClassTaskConfig, Tag(KINDS[1])], Discriminator(_kind)
]


class BenchmarkConfig(_Section):
    """A stream of tasks in the order in which they are learned, and probes that are only evaluated.

    After a stage the tasks of `evaluate` are evaluated: "all", each by itself; or those "seen" so far, where the model
    chooses among the classes of all of them (class-incremental learning).

    `aliases` names folders below the data root that are also published under another name; the one that is there is
    used.
    """

    name: str
    description: str = ""
    aliases: dict[_Name, _Name] = {}
    evaluate: Literal["all", "seen"] = "all"
    tasks: tuple[AnyTask, ...] = Field(min_length=1)
    probes: tuple[AnyTask, ...] = ()

    @property
    def evaluated(self) -> tuple[AnyTask, ...]:
        """The tasks and the probes."""
        return (*self.tasks, *self.probes)

    def evaluated_after(self, stage: int) -> tuple[AnyTask, ...]:
        """The tasks and probes that are evaluated after a stage; 0 is the untouched base."""
        return self.evaluated if self.evaluate == "all" else self.tasks[:stage]

    def with_each(self, change: Callable[[AnyTask], AnyTask]) -> BenchmarkConfig:
        """The benchmark with every task and probe changed."""
        changed = {part: tuple(map(change, getattr(self, part))) for part in ("tasks", "probes")}
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _distinct(self) -> BenchmarkConfig:
        names = [task.name for task in self.evaluated]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"task names must differ, doubled: {', '.join(doubled)}")
        untrained = [task.name for task in self.tasks if task.train is None]
        if untrained:
            raise ValueError(f"tasks without a train file: {', '.join(untrained)}")
        kinds = {type(task) for task in self.evaluated}
        if len(kinds) > 1:
            raise ValueError("tasks of instructions and tasks of classes cannot be mixed in one stream")
        if self.evaluate == "seen" and (kinds != {ClassTaskConfig} or self.probes):
            raise ValueError("evaluate: 'seen' is for tasks of classes, without probes")
        return self


class ModelConfig(_Section):
    """The pretrained model that the stream starts from.

    `vision_tower` is needed only where a checkpoint of LLaVA's own layout does not find its tower by itself. `dtype` is
    what the run computes in; "auto", the checkpoint's own, is for exports alone. `cosine_heads` gives a CLIP a head for
    each task beside its prompts (KeepLoRA+). `truncate` keeps of the weights of a CLIP's towers, by the linears' own
    names, the singular directions that hold a share of the singular values' sum (`{vision: {q_proj: 0.9}}`).
    """

    family: str = "llava"
    path: _Place
    vision_tower: _Place | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cosine_heads: bool = False
    truncate: dict[str, dict[str, Annotated[float, Field(gt=0, le=1)]]] = {}


class MethodConfig(_Section):
    """The method's name and its own options, which the method's file validates.

    `parts` changes options for a part of the model: of a CLIP, its "vision" and its "text" tower.
    """

    name: str
    options: dict[str, JsonValue] = {}
    parts: dict[str, dict[str, JsonValue]] = {}


class LoraConfig(_Section):
    """LoRA adapters; the update of a weight is `alpha / rank * B @ A`.

    `targets` are the own names of the adapted linears (`[k_proj, v_proj]`); null = all that the model's family adapts.
    """

    rank: _Count
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None


class TaskTraining(_Section):
    """Hyper-parameters that one task overrides."""

    epochs: _Count | None = None
    learning_rate: float | None = Field(None, gt=0)


class TrainingConfig(_Section):
    """Training of one stage. `global_batch` is over all ranks and accumulation steps, `micro_batch` an upper bound."""

    epochs: _Count = 1
    learning_rate: float = Field(gt=0)
    projector_learning_rate: float | None = Field(None, gt=0, description="null freezes the projector")
    head_learning_rate: float | None = Field(None, gt=0, description="of a task's head; null = learning_rate")
    temperature: float = Field(1.0, gt=0, description="logits of classes are divided by it in the loss")
    global_batch: _Count
    micro_batch: _Count
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    scheduler: Literal["cosine", "linear", "constant", "steps", "one_cycle"] = "cosine"
    milestones: tuple[float, ...] = Field((), description="shares of the training after which 'steps' divides by 10")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(0.0, ge=0, description="0 = no clipping")
    max_length: _Count = 2048
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="compute layers again in backward: 'auto' = on a GPU, if its memory would not hold them"
    )
    checkpoint_every: _Count | None = Field(None, description="optimizer steps between resume points")
    workers: int = Field(0, ge=0, le=1024)
    per_task: dict[str, TaskTraining] = {}

    def micro_batch_for(self, ranks: int) -> int:
        """Samples in one forward pass on one rank: at most `micro_batch`, and such that the ranks share evenly.

        Raises:
            InputError: the number of ranks does not divide the global batch.
        """
        share, rest = divmod(self.global_batch, ranks)
        if rest:
            raise InputError(
                f"training.global_batch: {ranks} ranks cannot share {self.global_batch} samples evenly; "
                "use a number of ranks that divides it."
            )
        return max(size for size in range(1, min(self.micro_batch, share) + 1) if share % size == 0)


class MeasurementConfig(_Section):
    """How statistics are measured: the share of a task's samples, and samples per forward pass.

    `sums` says where each rank keeps the fp32 sums: all on its "device", in "host" memory, or at most so many GB on the
    device, in as many passes over the samples as that takes. `sketch` measures, where a stage is initialised, random
    sketches of the gradients with so many columns in their place, and is at least `lora.rank` (4 times it is good);
    null measures the gradients themselves.
    """

    ratio: float = Field(0.2, gt=0, le=1)
    batch_size: _Count = 8
    sums: Literal["device", "host"] | Annotated[float, Field(gt=0)] = "device"
    sketch: _Count | None = None


class EvaluationConfig(_Section):
    """Generation and scoring. `zero_shot` also evaluates the untouched base as stage 0.

    `caption_scorer` scores caption tasks; `caption_overlap` needs no Java, and its numbers are not comparable.
    """

    batch_size: _Count = 16
    max_new_tokens: _Count = 1024
    split: Literal["test", "validation"] = "test"
    zero_shot: bool = True
    caption_scorer: Literal["caption", "caption_overlap"] = "caption"


class ImagesConfig(_Section):
    """How pictures of class folders are brought to the size of the model, whose square is cut out of the centre.

    `resize` is the short side's length, or height and width; default the model's size. `augment` names an AutoAugment
    policy, which with a random resized crop takes the place of both in training.
    """

    resize: int | tuple[int, int] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    augment: Literal["cifar10", "imagenet"] | None = None


class DistributedConfig(_Section):
    """Ranks per node (null = one for each GPU, or one on a CPU) and the DeepSpeed file (null = plain DDP).

    `timeout_minutes` is how long ranks wait for one another before the job fails; without progress it fails after
    twice that and a minute. `grace_seconds` is how long a job that is asked to stop may take to write its resume point.
    """

    ranks: _Count | None = None
    deepspeed: _Place | None = None
    timeout_minutes: float = Field(30, gt=0, le=100_000)
    grace_seconds: float = Field(60, ge=0, le=100_000)


class RunConfig(_Section):
    """Everything a run depends on, resolved and validated.

    `report_to` lists where curves are also written; null = TensorBoard, if its package is installed.
    """

    name: _Label
    seed: int = 42
    benchmark: BenchmarkConfig
    model: ModelConfig
    method: MethodConfig
    data_root: _Place
    lora: LoraConfig
    training: TrainingConfig
    images: ImagesConfig = ImagesConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    report_to: tuple[Literal["tensorboard", "wandb"], ...] | None = None
    unmatched_limit: float = Field(0.01, ge=0, le=1, description="share of samples without a usable mask")

    @model_validator(mode="after")
    def _known_tasks(self) -> RunConfig:
        unknown = set(self.training.per_task) - {task.name for task in self.benchmark.tasks}
        if unknown:
            raise ValueError(f"training.per_task names no task of the benchmark: {', '.join(sorted(unknown))}")
        return self

    def task(self, stage: int) -> AnyTask:
        """The task learned at stage 1..T."""
        return self.benchmark.tasks[stage - 1]

    def epochs(self, task: str) -> int:
        """Epochs of a task, its own value or the run's."""
        own = self.training.per_task.get(task)
        return own.epochs if own and own.epochs else self.training.epochs

    def learning_rate(self, task: str) -> float:
        """Learning rate of a task, its own value or the run's."""
        own = self.training.per_task.get(task)
        return own.learning_rate if own and own.learning_rate else self.training.learning_rate

    def identity(self) -> dict[str, Any]:
        """What a run's result depends on: everything but the name, places, and what changes speed or memory alone."""
        content = self.model_dump(mode="json")
        for section, key in _NOT_IDENTITY:
            del (content[section] if section else content)[key]
        del content["benchmark"]["aliases"]
        for task in (*content["benchmark"]["tasks"], *content["benchmark"]["probes"]):
            del task["records"]
        return {**content, "deepspeed": self.distributed.deepspeed is not None}
