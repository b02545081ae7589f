"""The steps of a stage. Each reads complete files of the run directory and writes its own, or nothing.

The model that a step needs is that of the base checkpoint and the stored adapters, whatever was done before it, so
that a resumed run and an undisturbed one compute the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llava_cl.config import AnyTask
from llava_cl.distributed import collect_tensors
from llava_cl.errors import RunError
from llava_cl.methods import LayerStatistics, LoraFactors
from llava_cl.models import LinearTarget
from llava_cl.pipeline.bases import load_bases, load_moments, save_columns, size_of, update_moments
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.measuring import measure_task
from llava_cl.pipeline.planning import recomputes
from llava_cl.pipeline.scoring import answers_step, predictions_file, score_stage
from llava_cl.pipeline.task_data import read_questions
from llava_cl.store import load_tensors, save_tensors, write_jsonl
from llava_cl.subspace import full_precision
from llava_cl.training.adapters import attach, collect, install, load_factors, save_adapter, trained_a
from llava_cl.training.statistics import Statistics
from llava_cl.training.trainer import TrainingPlan, train

_START = "start:"
"""Stands before the names of parameters in the file of initial factors."""


def protect_base(job: Job, stage: int) -> list[Path]:
    """Stage 0: the basis of what the pretrained weights themselves use."""
    report = job.progress.step(stage, "protect")
    model = job.model_after(0)
    owners = job.owners(model)
    mine: dict[str, torch.Tensor] = {}
    sizes: dict[str, dict[str, float]] = {}
    with job.timed("protect"), full_precision():
        owned = _owned(job, model, owners)
        report(0, len(owned))
        for done, (name, target) in enumerate(owned.items(), start=1):
            with _naming(name):
                basis = job.methods.of(target.part).initial_basis(target.module.weight.detach().float())
                if basis is not None:
                    mine[name] = basis
                    sizes[name] = size_of(target.module.weight, basis)
            report(done, len(owned))
        save_columns(job, stage, mine, sizes, owners)
    return [job.stage(stage).subspace]


def initialise(job: Job, stage: int) -> list[Path]:
    """Measures what the method asks for on the model before the task, and starts the LoRA factors from it."""
    model = job.model_after(stage - 1, to_learn=True)
    job.samples.choose(model, stage)
    start = job.samples.start(model, stage, torch.Generator().manual_seed(job.seed(stage, "head")), job.world)
    owners = job.owners(model)
    measured = measure_task(job, model, stage, "before", owners)
    report = job.progress.step(stage, "initialise")
    a: dict[str, torch.Tensor] = {}
    b: dict[str, torch.Tensor] = {}
    with job.timed("initialise"), full_precision():
        owned = _owned(job, model, owners)
        bases = load_bases(job.run, stage - 1, owned)
        known = _Known(measured, stage - 1, len(job.config.benchmark.tasks), job.world.device)
        if stage > 1 and "past_moment" in job.methods.wanted("before"):
            known.past_moments = load_moments(job.run, stage - 1, {target.source for target in owned.values()})[0]
        if stage > 1 and "adapter" in job.methods.wanted("before"):
            known.adapters = load_factors(job.stage(stage - 1).adapter, owned)
        report(0, len(owned))
        for done, (name, (module, source, part)) in enumerate(owned.items(), start=1):
            generator = torch.Generator().manual_seed(job.seed(stage, f"initialise/{name}"))
            with _naming(name):
                a[name], b[name] = job.methods.of(part).initialise(
                    (module.out_features, module.in_features),
                    job.config.lora.rank,
                    known.layer(name, source),
                    bases[name].to(job.world.device) if name in bases else None,
                    generator,
                )
            report(done, len(owned))
        a, b = collect_tensors(a, owners, job.world), collect_tensors(b, owners, job.world)
    file = job.stage(stage).initial_factors
    if job.world.is_main:
        save_tensors(
            file,
            {
                **{f"{name}.{factor}": value for factor, of in (("a", a), ("b", b)) for name, value in of.items()},
                **{f"{_START}{name}": value for name, value in start.items()},
            },
            {"samples": measured.samples, "skipped": measured.skipped},
        )
    return [file]


def learn(job: Job, stage: int) -> list[Path]:
    """Trains the adapters (and the projector) on the task and stores them."""
    config, directory = job.config, job.stage(stage)
    report = job.progress.step(stage, "train")
    model = job.model_to_train(stage - 1)
    job.samples.choose(model, stage)
    stored = load_tensors(directory.initial_factors)[0]
    install(model, {name.removeprefix(_START): value for name, value in stored.items() if name.startswith(_START)})
    parts = {name: target.part for name, target in job.targets(model).items()}
    factors = {name: LoraFactors(stored[f"{name}.a"], stored[f"{name}.b"]) for name in parts}
    beside = job.samples.beside(stage)
    projector = beside.name if beside else None
    adapted = attach(
        model,
        factors,
        config.lora,
        train_a=job.methods.train_a,
        projector=projector,
        fp32_adapters=job.deepspeed is None,
    )
    dataset, lengths, ids, set_epoch = job.samples.training(config.task(stage), job.seed(stage, "augment"))
    with job.timed("train"):
        trained = train(
            adapted,
            dataset,
            lengths,
            job.samples.collate,
            config,
            TrainingPlan.of(
                config,
                stage,
                job.seed(stage, "train"),
                beside.learning_rate if beside else None,
                recompute=recomputes(config, job.samples, config.task(stage), job.world),
            ),
            deepspeed=job.deepspeed,
            world=job.world,
            folder=directory.checkpoints,
            set_epoch=set_epoch,
            penalty=_penalty(job, stage, adapted, parts),
            progress=report,
            stop=job.stop,
            ids=ids,
            follows=directory.origin().digest,
        )
    job.facts["trained"] = {"samples": trained.samples, "tokens": trained.tokens}
    tensors = collect(adapted, factors, projector, train_a=job.methods.train_a)
    if not job.world.is_main:
        return []
    write_jsonl(directory.train_log, trained.rows)
    return [*save_adapter(directory.adapter, tensors, list(factors), config.lora, projector), directory.train_log]


def _penalty(job: Job, stage: int, adapted: PeftModel, parts: Mapping[str, str]) -> Callable[[], torch.Tensor] | None:
    """The sum of the method's penalties over all layers (with the part of the model each is in), if it has any."""
    if not job.methods.penalises:
        return None
    factors = trained_a(adapted, parts)
    bases = {name: basis.to(job.world.device) for name, basis in load_bases(job.run, stage - 1, parts).items()}
    methods = {part: job.methods.of(part) for part in set(parts.values())}

    def penalty() -> torch.Tensor:
        each = [methods[parts[name]].penalty(a, bases.get(name)).float() for name, a in factors.items()]
        return torch.stack(each).sum()

    return penalty


def protect(job: Job, stage: int) -> list[Path]:
    """Measures the merged model and grows the basis by what the task uses."""
    model = job.model_after(stage)
    owners = job.owners(model)
    measured = measure_task(job, model, stage, "after", owners)
    report = job.progress.step(stage, "protect")
    mine: dict[str, torch.Tensor] = {}
    sizes: dict[str, dict[str, float]] = {}
    files = [job.stage(stage).subspace]
    with job.timed("protect"), full_precision():
        owned = _owned(job, model, owners)
        bases = load_bases(job.run, stage - 1, owned)
        known = _Known(measured, stage, len(job.config.benchmark.tasks), job.world.device)
        if "past_moment" in job.methods.wanted("after"):
            known.past_moments = update_moments(job, stage, measured.second_moments, measured.tokens, owners)
            files.append(job.stage(stage).moments)
        if "adapter" in job.methods.wanted("after"):
            known.adapters = load_factors(job.stage(stage).adapter, owned)
        report(0, len(owned))
        for done, (name, target) in enumerate(owned.items(), start=1):
            with _naming(name):
                basis = job.methods.of(target.part).protect(
                    known.layer(name, target.source), bases[name].to(job.world.device) if name in bases else None
                )
                if basis is not None:
                    mine[name] = basis[:, bases[name].shape[1] if name in bases else 0 :]
                    sizes[name] = size_of(target.module.weight, basis)
            report(done, len(owned))
        save_columns(job, stage, mine, sizes, owners)
    return files


def evaluate(job: Job, stage: int) -> list[Path]:
    """Answers the questions of every task and probe."""
    return answer(job, stage, job.config.benchmark.evaluated_after(stage))


def answer(job: Job, stage: int, tasks: Sequence[AnyTask]) -> list[Path]:
    """Answers the questions of tasks; those whose predictions are recorded are not asked again."""
    directory = job.stage(stage)
    files = [predictions_file(directory, task.name) for task in tasks]
    model: PreTrainedModel | None = None
    for task, file in zip(tasks, files, strict=True):
        if job.decide(job.world.is_main and directory.step_done(answers_step(task.name))):
            continue
        if model is None:
            model = job.model_after(stage)
        questions = read_questions(job.config, task)
        report = job.progress.step(stage, f"evaluate {task.name}")
        with job.timed("evaluate"):
            texts = job.samples.answer(model, stage, task, questions, job.world, report)
        cost = job.take_cost()
        if job.world.is_main:
            rows = [
                {"question_id": record.id, "prompt": record.text, "text": text}
                for record, text in zip(questions, texts, strict=True)
            ]
            write_jsonl(file, rows)
            directory.record_step(answers_step(task.name), [file], **cost)
    return files


def score(job: Job, stage: int) -> list[Path]:
    """Scores the recorded predictions; needs no model.

    Raises:
        InputError: predictions that do not match the questions.
    """
    directory = job.stage(stage)
    if job.world.is_main:
        with job.timed("score"):
            scores = score_stage(job.config, directory)
        job.facts["scores"] = {
            task: {key: value for key, value in own.items() if key != "credits"} for task, own in scores.items()
        }
    return [directory.scores]


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Adds the layer's name to what the maths found wrong with its input."""
    try:
        yield
    except ValueError as error:
        raise RunError(f"{layer}: {error}") from error


@dataclass
class _Known:
    """What the steps know of the layers, for the method."""

    measured: Statistics
    tasks: int
    stream: int
    device: torch.device
    past_moments: dict[str, torch.Tensor] = field(default_factory=dict)
    adapters: dict[str, LoraFactors] = field(default_factory=dict)

    def layer(self, name: str, source: str) -> LayerStatistics:
        adapter = self.adapters.get(name)
        return LayerStatistics(
            tasks=self.tasks,
            stream=self.stream,
            gradient=self._here(self.measured.gradient(name)),
            second_moment=self._here(self.measured.second_moments.get(source)),
            past_moment=self._here(self.past_moments.get(source)),
            mean_input=self._here(self.measured.mean_inputs.get(source)),
            adapter=LoraFactors(*(factor.to(self.device) for factor in adapter)) if adapter else None,
        )

    def _here(self, statistic: torch.Tensor | None) -> torch.Tensor | None:
        """On this rank's device, where the layer's turn has come."""
        return None if statistic is None else statistic.to(self.device)


def _owned(job: Job, model: PreTrainedModel, owners: dict[str, int]) -> dict[str, LinearTarget]:
    targets = job.targets(model)
    return {name: target for name, target in targets.items() if owners[name] == job.world.rank}
