"""Tasks of image classes: pictures in a folder for each class, to be told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from llava_cl.config import AnyTask, ClassTaskConfig, RunConfig
from llava_cl.data import (
    Augmented,
    ClassDataset,
    ClassRecord,
    Plain,
    QuestionRecord,
    collate_images,
    load_class_records,
)
from llava_cl.distributed import World, all_reduce_sum, gather_objects, local_share
from llava_cl.errors import InputError
from llava_cl.evaluation.predict import predict
from llava_cl.models import ClassifierFamily, classifier_family
from llava_cl.pipeline.samples import TrainedModule, TrainingData
from llava_cl.pipeline.task_data import evaluation_folder
from llava_cl.training.adapters import install


class ImageClasses:
    """Samples of tasks of classes for a model that tells them (see `llava_cl.pipeline.samples.Samples`)."""

    collate = staticmethod(collate_images)

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.family: ClassifierFamily = classifier_family(config.model)
        if config.benchmark.evaluate == "all" and not self.family.zero_shot:
            raise InputError(
                f"benchmark.evaluate: a model of family '{config.model.family}' knows no class before it has learned "
                "it; write 'seen'."
            )
        self._tasks = [task for task in config.benchmark.evaluated if isinstance(task, ClassTaskConfig)]
        self._check_names()
        spec, images = self.family.image_spec(), config.images
        resize = images.resize or spec.size
        if min([resize] if isinstance(resize, int) else resize) < spec.size:
            raise InputError(f"images.resize: {resize} is less than the model's side of {spec.size} pixels.")
        self._plain = Plain(spec.size, resize, images.interpolation, spec.mean, spec.std)
        if images.augment is not None:
            self._augmented(seed=0)  # now, so that what it needs is found missing before a run

    def _check_names(self) -> None:
        """Refuses two classes to choose among that are one to the scorer, or to a model that reads their names.

        Raises:
            InputError: all such pairs.
        """
        problems = []
        known: dict[str, str] = {}
        for task in self._tasks:
            if self._config.benchmark.evaluate == "all":
                known = {}
            with contextlib.suppress(InputError):  # its folders are missing, which is told elsewhere
                for folder, name in zip(task.folders, task.class_names(), strict=True):
                    place = f"{task.name}/{folder}"
                    called = " ".join(name.replace("_", " ").casefold().split())
                    keys = [folder.upper(), *([f"/{called}"] if self.family.zero_shot else [])]
                    for other in {known.setdefault(key, place) for key in keys} - {place}:
                        problems.append(f"benchmark: classes {other} and {place} have one name; give them others.")
        if problems:
            raise InputError(*problems)

    def problems(self, model: PreTrainedModel) -> list[str]:
        """None: prompts are looked at where the model is prepared."""
        return []

    def prepare(self, model: PreTrainedModel) -> None:
        """Heads or prompts of all tasks."""
        self.family.install(model, self._tasks)

    def choose(self, model: PreTrainedModel, stage: int) -> None:
        """Labels are positions in the task's classes."""
        self.family.learn(model, stage - 1, self._config.training.temperature)

    def start(
        self, model: PreTrainedModel, stage: int, generator: torch.Generator, world: World
    ) -> dict[str, torch.Tensor]:
        """The start of the task's head, which may know the means of the classes.

        What a CLIP is to learn is measured before its head is there (KeepLoRA+, as in the authors' code).
        """
        head = self.family.head(stage - 1)
        if head is None:
            return {}
        task = self._tasks[stage - 1]
        means = self._class_means(model, task, world) if self.family.head_from_means else None
        own = self.family.head_start(model, stage - 1, means, generator)
        start = {f"{head}.{name}": value for name, value in own.items()}
        if not self.family.zero_shot:
            install(model, start)
        return start

    def _class_means(self, model: PreTrainedModel, task: ClassTaskConfig, world: World) -> torch.Tensor:
        """Mean over each class's training images of their features at unit length, `[classes, width]` fp32."""
        data, size = self.measured(task), self._config.measurement.batch_size
        starts = local_share(range(0, len(data.lengths), size), world)
        sums: torch.Tensor | None = None
        counts = torch.zeros(len(task.folders), device=world.device)
        for begin in starts:
            batch = self.collate([data.dataset[i] for i in range(begin, min(begin + size, len(data.lengths)))])
            labels = batch["labels"].to(world.device)
            with torch.inference_mode():
                features = self.family.features(model, batch["pixel_values"].to(world.device)).float()
                features = torch.nn.functional.normalize(features, dim=1)
            if sums is None:
                sums = torch.zeros(len(task.folders), features.shape[1], device=world.device)
            sums.index_add_(0, labels, features)
            counts += labels.bincount(minlength=len(task.folders))
        width = max(gather_objects(0 if sums is None else sums.shape[1], world))
        sums = torch.zeros(len(task.folders), width, device=world.device) if sums is None else sums
        return (all_reduce_sum(sums, world) / all_reduce_sum(counts, world)[:, None]).cpu()

    def beside(self, stage: int) -> TrainedModule | None:
        """The task's head, if the model has heads."""
        head, training = self.family.head(stage - 1), self._config.training
        rate = training.head_learning_rate or self._config.learning_rate(self._config.task(stage).name)
        return TrainedModule(head, rate) if head else None

    def training(self, task: AnyTask, seed: int) -> TrainingData:
        """Pictures of the training split, augmented where that is configured."""
        if self._config.images.augment is None:
            return self.measured(task)
        augmented = self._augmented(seed)

        def set_epoch(epoch: int) -> None:
            augmented.epoch = epoch

        return self._data(task, augmented)._replace(set_epoch=set_epoch)

    def _augmented(self, seed: int) -> Augmented:
        spec, images = self.family.image_spec(), self._config.images
        assert images.augment is not None
        return Augmented(images.augment, spec.size, images.interpolation, spec.mean, spec.std, seed)

    def measured(self, task: AnyTask) -> TrainingData:
        """Pictures of the training split as they are evaluated."""
        return self._data(task, self._plain)

    def _data(self, task: AnyTask, transform: Plain | Augmented) -> TrainingData:
        assert isinstance(task, ClassTaskConfig) and task.train is not None
        root = self._config.data_root
        records = load_class_records(root / task.train, task.folders)
        dataset = ClassDataset(records, root, task.train, transform)
        return TrainingData(dataset, [1] * len(records), [record.id for record in records])

    def answer(
        self,
        model: PreTrainedModel,
        stage: int,
        task: AnyTask,
        questions: Sequence[QuestionRecord],
        world: World,
        progress: Callable[[int, int], None],
    ) -> list[str]:
        """The class with the highest score, among the task's own or among all seen so far."""
        assert isinstance(task, ClassTaskConfig)
        config = self._config
        tasks = range(stage) if config.benchmark.evaluate == "seen" else [self._tasks.index(task)]
        names = [name for number in tasks for name in self._tasks[number].folders]
        records = [ClassRecord(str(question.id), 0) for question in questions]
        dataset = ClassDataset(records, config.data_root, evaluation_folder(task, config.evaluation), self._plain)

        score = self.family.scorer(model, tasks)

        def classify(batch: dict[str, torch.Tensor]) -> list[str]:
            pixels = batch["pixel_values"].to(world.device)
            return [names[best] for best in score(pixels).argmax(dim=1).tolist()]

        return predict(
            classify,
            dataset,
            [1] * len(questions),
            batch_size=config.evaluation.batch_size,
            collate=collate_images,
            workers=config.training.workers,
            world=world,
            progress=progress,
        )
