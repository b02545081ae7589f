"""What a run configuration can say: its sections, their defaults, and what is wrong."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, Strict, model_validator

from llava_cl.config.benchmark import AnyTask, BenchmarkConfig, Count, Label, Place
from llava_cl.config.section import Many, Section
from llava_cl.errors import InputError
from llava_cl.parsing import near_miss

_NOT_IDENTITY = {
    "model": ("path", "vision_tower", "attention"),
    "training": ("micro_batch", "workers", "checkpoint_every", "gradient_checkpointing"),
    "measurement": ("batch_size", "sums"),
    "evaluation": ("batch_size",),
    "benchmark": ("aliases",),
}


class ModelConfig(Section):
    """The pretrained model that the stream starts from.

    `vision_tower` is needed only where a checkpoint of LLaVA's own layout does not find its tower by itself. `dtype` is
    what the run computes in; "auto", the checkpoint's own, is for exports alone. `merged_dtype` is what it measures and
    evaluates in, with the merged weights rounded to that, where this is not to be `dtype`; training is not touched by
    it. `cosine_heads` gives a CLIP a head for
    each task beside its prompts (KeepLoRA+). `truncate` keeps of the weights of a CLIP's towers, by the linears' own
    names, the singular directions that hold a share of the singular values' sum (`{vision: {q_proj: 0.9}}`).
    """

    family: str = "llava"
    path: Place
    vision_tower: Place | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    merged_dtype: Literal["float16", "float32"] | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cosine_heads: bool = False
    truncate: dict[str, dict[str, Annotated[float, Field(gt=0, le=1)]]] = Field({})

    def dtype_in(self, step: str) -> str:
        """The dtype of the weights where a run does "train", "measure" or "evaluate"."""
        return self.dtype if step == "train" or self.merged_dtype is None else self.merged_dtype


class MethodConfig(Section):
    """The method's name and its own options, which the method's file validates.

    `parts` changes options for a part of the model: of a CLIP, its "vision" and its "text" tower.
    """

    name: str
    options: dict[str, JsonValue] = Field({})
    parts: dict[str, dict[str, JsonValue]] = Field({})


class LoraConfig(Section):
    """LoRA adapters; the update of a weight is `alpha / rank * B @ A`.

    `targets` are the own names of the adapted linears (`[k_proj, v_proj]`); null = all that the model's family adapts.
    """

    rank: Count
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Annotated[Many[str], Field(min_length=1)] | None = None


class TaskTraining(Section):
    """Hyper-parameters that one task overrides."""

    epochs: Count | None = None
    learning_rate: float | None = Field(None, gt=0)


class TrainingConfig(Section):
    """Training of one stage. `global_batch` is over all ranks and accumulation steps, `micro_batch` an upper bound."""

    epochs: Count = 1
    learning_rate: float = Field(gt=0)
    projector_learning_rate: float | None = Field(None, gt=0, description="null freezes the projector")
    head_learning_rate: float | None = Field(None, gt=0, description="of a task's head; null = learning_rate")
    temperature: float = Field(1.0, gt=0, description="logits of classes are divided by it in the loss")
    global_batch: Count
    micro_batch: Count
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    scheduler: Literal["cosine", "linear", "constant", "steps", "one_cycle"] = "cosine"
    milestones: Many[float] = Field((), description="shares of the training after which 'steps' divides by 10")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(0.0, ge=0, description="0 = no clipping")
    max_length: Count = 2048
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="compute layers again in backward: 'auto' = on a GPU, if its memory would not hold them"
    )
    checkpoint_every: Count | None = Field(None, description="optimizer steps between resume points")
    workers: int = Field(0, ge=0, le=1024)
    per_task: dict[str, TaskTraining] = Field({})

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


class MeasurementConfig(Section):
    """How statistics are measured: the share of a task's samples, and samples per forward pass.

    `sums` says where each rank keeps the fp32 sums: all on its "device", in "host" memory, or at most so many GB on the
    device, in as many passes over the samples as that takes. `sketch` measures, where a stage is initialised, random
    sketches of the gradients with so many columns in their place, and is at least `lora.rank` (4 times it is good);
    null measures the gradients themselves.
    """

    ratio: float = Field(0.2, gt=0, le=1)
    batch_size: Count = 8
    sums: Literal["device", "host"] | Annotated[float, Field(gt=0)] = "device"
    sketch: Count | None = None


class EvaluationConfig(Section):
    """Generation and scoring. `zero_shot` also evaluates the untouched base as stage 0.

    `caption_scorer` scores caption tasks; `caption_overlap` needs no Java, and its numbers are not comparable.
    """

    batch_size: Count = 16
    max_new_tokens: Count = 1024
    split: Literal["test", "validation"] = "test"
    zero_shot: bool = True
    caption_scorer: Literal["caption", "caption_overlap"] = "caption"


class ImagesConfig(Section):
    """How pictures of class folders are brought to the size of the model, whose square is cut out of the centre.

    `resize` is the short side's length, or height and width; default the model's size. `augment` names an AutoAugment
    policy, which with a random resized crop takes the place of both in training.
    """

    resize: int | Annotated[tuple[int, int], Strict(False)] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    augment: Literal["cifar10", "imagenet"] | None = None


class DistributedConfig(Section):
    """Ranks per node (null = one for each GPU, or one on a CPU) and the DeepSpeed file (null = plain DDP).

    `timeout_minutes` is how long ranks wait for one another before the job fails; without progress it fails after
    twice that and a minute. `grace_seconds` is how long a job that is asked to stop may take to write its resume point.
    """

    ranks: Count | None = None
    deepspeed: Place | None = None
    timeout_minutes: float = Field(30, gt=0, le=100_000)
    grace_seconds: float = Field(60, ge=0, le=100_000)


class RunConfig(Section):
    """Everything a run depends on, resolved and validated.

    `deterministic` makes GPUs, too, give the same bits each time, at a price in speed; a CPU does so without it.
    `report_to` lists where curves are also written; null = TensorBoard, if its package is installed.
    """

    name: Label
    seed: int = 42
    deterministic: bool = False
    benchmark: BenchmarkConfig
    model: ModelConfig
    method: MethodConfig
    data_root: Place
    lora: LoraConfig
    training: TrainingConfig
    images: ImagesConfig = ImagesConfig()
    measurement: MeasurementConfig = MeasurementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    report_to: Many[Literal["tensorboard", "wandb"]] | None = None
    unmatched_limit: float = Field(0.01, ge=0, le=1, description="share of samples without a usable mask")

    @model_validator(mode="after")
    def _known_tasks(self) -> RunConfig:
        tasks = [task.name for task in self.benchmark.tasks]
        unknown = sorted(set(self.training.per_task) - set(tasks))
        if unknown:
            close = near_miss(unknown[0], tasks)
            raise ValueError(f"training.per_task names no task of the benchmark: {', '.join(unknown)}.{close}")
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
        """What of it a run's result depends on: all but the name, places, and what changes speed or memory alone."""
        content = self.model_dump(mode="json")
        for key in ("name", "data_root", "distributed", "unmatched_limit", "report_to"):
            del content[key]
        for section, keys in _NOT_IDENTITY.items():
            for key in keys:
                del content[section][key]
        for task in (*content["benchmark"]["tasks"], *content["benchmark"]["probes"]):
            del task["records"]
        return content
