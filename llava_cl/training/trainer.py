"""Training of one stage: a Trainer whose result does not depend on how many ranks share the global batch.

The loss of an optimizer step is the mean over all supervised tokens of its global batch, over ranks and
accumulation steps. The samples of each global batch are drawn without regard to the number of ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_cl.config import RunConfig, TrainingConfig
from llava_cl.data import GlobalBatchSampler
from llava_cl.distributed import World, barrier, gather_objects
from llava_cl.environment import RESULT, drop
from llava_cl.errors import RunError
from llava_cl.stopping import Stopped, StopRequest, outlive_signals
from llava_cl.store import resume_points
from llava_cl.training.deepspeed_file import zero_stage
from llava_cl.training.statistics import save_memory, without_index
from llava_cl.training.watch import TrainingWatch, log_row


@dataclass(frozen=True)
class TrainingPlan:
    """Hyper-parameters of one stage's training, resolved for its task."""

    epochs: int
    learning_rate: float
    seed: int
    beside_learning_rate: float | None = None
    """Of the module that is trained whole beside the adapters."""
    recompute: bool = False
    """Compute layers again in backward."""

    @classmethod
    def of(
        cls, config: RunConfig, stage: int, seed: int, beside_learning_rate: float | None, *, recompute: bool
    ) -> TrainingPlan:
        """The plan of a stage."""
        task = config.task(stage).name
        return cls(config.epochs(task), config.learning_rate(task), seed, beside_learning_rate, recompute)


class StageTrainer(Trainer):
    """The Trainer over our own sampler, with a learning rate of its own for what is trained beside the adapters."""

    def __init__(
        self,
        *,
        model: PeftModel,
        args: TrainingArguments,
        dataset: Dataset,
        sampler: GlobalBatchSampler,
        collate: Callable[..., Any],
        training: TrainingConfig,
        beside_learning_rate: float | None,
        penalty: Callable[[], torch.Tensor] | None,
        named: Callable[[int], str],
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collate, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        # So that the loss is divided by the tokens of the whole global batch; the model is inside PEFT's wrapper,
        # which shows no such argument.
        self.model_accepts_loss_kwargs = True
        self._sampler = sampler
        self._training = training
        self._beside_learning_rate = beside_learning_rate
        self._penalty = penalty
        self.samples = self.tokens = 0
        self._named = named

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next optimizer step, and its supervised tokens over all ranks.

        Raises:
            RunError: it has none, so that there is nothing to learn.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches and items is not None and not int(items):
            step = self.state.global_step + 1
            raise RunError(
                f"no sample of training step {step} has a label: {self._named(step)}. Correct or remove them."
            )
        return batches, items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, with its share of the penalty of the step."""
        self.samples += len(inputs["labels"])
        self.tokens += inputs["labels"].numel()
        loss: Any = super().compute_loss(model, without_index(inputs), num_items_in_batch=num_items_in_batch)
        if self._penalty is not None:
            # Micro-batches are summed and ranks averaged.
            loss = loss + self._penalty() / self._sampler.accumulation_steps
        return loss

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches; not prepared by accelerate, which would share them out again."""
        assert isinstance(self.train_dataset, Dataset)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapters of a resume point.

        DeepSpeed's own files hold them, and the Trainer would clone or write the whole model beside.
        """
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over two groups: adapters at the stage's learning rate, what is beside them at its own."""
        if self.optimizer is None:
            adapters: list[torch.nn.Parameter] = []
            beside: list[torch.nn.Parameter] = []
            trained = self.model if model is None else model
            assert trained is not None
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    (beside if "modules_to_save" in name.split(".") else adapters).append(parameter)
            groups: list[dict[str, Any]] = [{"params": adapters, "lr": self.args.learning_rate}]
            if beside:
                groups.append({"params": beside, "lr": self._beside_learning_rate})
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The scheduler that the configuration names; transformers' own, or one of torch's."""
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        made: Any
        # The wrappers of accelerate and DeepSpeed lack parts of a torch optimizer, but share its parameter groups.
        inner: Any = optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        if self._training.scheduler == "steps":
            milestones = [round(share * num_training_steps) for share in self._training.milestones]
            made = torch.optim.lr_scheduler.MultiStepLR(inner, milestones)
        elif self._training.scheduler == "one_cycle":
            rates = [group["lr"] for group in inner.param_groups]
            made = torch.optim.lr_scheduler.OneCycleLR(inner, rates, num_training_steps)
        else:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = made
        return made


def training_arguments(
    training: TrainingConfig,
    plan: TrainingPlan,
    *,
    folder: Path,
    steps: int,
    micro_batch: int,
    accumulation: int,
    bf16: bool,
    device: torch.device,
    deepspeed: dict[str, Any] | None,
) -> TrainingArguments:
    """The Trainer's arguments for a stage of `steps` optimizer steps; scratch files go below `folder`.

    Call it after the process group has been initialised.
    """
    # transformers and accelerate read it, and a training before this one in the same process may have written it.
    drop(os.environ, RESULT)
    cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        # Those of torch are made by StageTrainer.
        lr_scheduler_type="constant" if training.scheduler in ("steps", "one_cycle") else training.scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        bf16=bf16 and deepspeed is not None,
        use_cpu=cpu,
        ddp_backend=dist.get_backend() if dist.is_initialized() else None,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed,
        seed=plan.seed,
        dataloader_num_workers=training.workers,
        average_tokens_across_devices=True,
        save_strategy="steps" if training.checkpoint_every else "no",
        save_steps=training.checkpoint_every or 500,
        # The one before stays until the new one is complete.
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
    )
    # A process has one device, also where it sees several: alone it would train in nn.DataParallel on all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class Trained(NamedTuple):
    """What training did.

    Attributes:
        rows: one for each optimizer step: step, epoch, loss, learning_rate, grad_norm.
        samples, tokens: what this process computed on all ranks, with what fills up batches; of classes, a picture is
            a token.
    """

    rows: list[dict[str, float]]
    samples: int
    tokens: int


def train(
    model: PeftModel,
    dataset: Dataset,
    lengths: list[int],
    collate: Callable[..., Any],
    config: RunConfig,
    plan: TrainingPlan,
    *,
    deepspeed: dict[str, Any] | None,
    world: World,
    folder: Path,
    progress: Callable[[int, int], None],
    set_epoch: Callable[[int], None] = lambda epoch: None,
    penalty: Callable[[], torch.Tensor] | None = None,
    stop: StopRequest | None = None,
    ids: Sequence[int | str] | None = None,
    follows: str = "",
) -> Trained:
    """Trains one stage, from its newest resume point if there is one.

    Args:
        model: the model with adapters attached.
        dataset: samples by index; -1 is a sample without labels that fills up the last global batch.
        lengths: length of each sample, negative for text alone (see `llava_cl.data.modality_lengths`).
        collate: list of samples -> batch.
        config: the run's configuration.
        plan: the stage's hyper-parameters.
        deepspeed: the DeepSpeed configuration, or None for plain DDP.
        world: the process group.
        folder: scratch folder of the Trainer.
        progress: called with steps done and steps in all.
        set_epoch: called with each epoch before its samples are asked for.
        penalty: added to the loss of every optimizer step.
        stop: asked after every optimizer step; from the first step on requests are deferred.
        ids: the samples' ids by index, to name them; default the indices.
        follows: what the stage is computed from; a resume point of another run is not used.

    Raises:
        RunError: the loss or the gradient is not finite or explodes, or no sample of a step has a label.
        Stopped: as asked, at a resume point from which the next call goes on.
    """
    training = config.training
    micro_batch = training.micro_batch_for(world.size)
    sampler = GlobalBatchSampler(lengths, training.global_batch, micro_batch, world.rank, world.size, plan.seed)
    args = training_arguments(
        training,
        plan,
        folder=folder,
        steps=len(sampler) // sampler.accumulation_steps * plan.epochs,
        micro_batch=micro_batch,
        accumulation=sampler.accumulation_steps,
        bf16=config.model.dtype == "bfloat16",
        device=world.device,
        deepspeed=deepspeed,
    )

    facts = {"ranks": world.size, "zero": zero_stage(deepspeed), "follows": follows}

    def named(step: int) -> str:
        return ", ".join(str(index if ids is None else ids[index]) for index in sampler.global_batch(step))

    trainer = StageTrainer(
        model=model,
        args=args,
        dataset=dataset,
        sampler=sampler,
        collate=collate,
        training=training,
        beside_learning_rate=plan.beside_learning_rate,
        penalty=penalty,
        named=named,
        callbacks=[TrainingWatch(sampler, set_epoch, progress, world, stop or StopRequest(), named, facts)],
    )
    resume = None
    if world.is_main:
        resume = resume_points.newest(folder, facts)
        if resume is None:
            # Parts of resume points of another number of ranks must not mix with new ones.
            resume_points.discard(folder)
    # One rank looks, so that no rank sees the folder while it is being emptied.
    resume = gather_objects(resume, world)[0]
    if plan.recompute:
        save_memory(model)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    # Otherwise models that this process loads later would be partitioned on loading, as this one was.
    unset_hf_deepspeed_config()
    if trainer.state.global_step < trainer.state.max_steps:
        barrier(world)  # no rank may end the others before the resume point is marked complete
        raise Stopped
    rows = [log_row(row) for row in trainer.state.log_history if "loss" in row]
    counts = gather_objects((trainer.samples, trainer.tokens), world)
    return Trained(rows, *(sum(column) for column in zip(*counts, strict=True)))
