"""The streams for CLIP and ViT hold the published orders, prompts, splits and hyper-parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_cl.config import ClassTaskConfig, RunConfig, load_benchmark, load_config, shipped_benchmarks
from llava_cl.methods import build_method
from llava_cl.methods.keeplora import KeepLora

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "configs" / "methods" / "keeplora_clip_published.yaml"
MTIL = {
    "Aircraft": (100, 3334, 3333, "a photo of a {}, a type of aircraft."),
    "Caltech101": (101, 6941, 1736, "a photo of a {}."),
    "CIFAR100": (100, 50000, 10000, "a photo of a {}."),
    "DTD": (47, 1880, 1880, "a photo of a {} thing."),
    "EuroSAT": (10, 21600, 5400, "a centered satellite photo of {}."),
    "Flowers": (102, 1020, 6149, "a photo of a {}, a type of flower."),
    "Food": (101, 75750, 25250, "a photo of a {}, a type of food."),
    "MNIST": (10, 60000, 10000, 'a photo of the number: "{}".'),
    "OxfordPet": (37, 3680, 3669, "a photo of a {}, a type of pet."),
    "StanfordCars": (196, 8144, 8041, "a photo of the {}, a type of car."),
    "SUN397": (397, 87003, 21751, "a photo of the {}."),
}
ORDER_1 = list(MTIL)
ORDER_2 = ["StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397"]
ORDER_2 += ["Aircraft", "Caltech101", "DTD", "EuroSAT", "CIFAR100"]
INCREMENTAL = {
    "cifar100_10": (10, "CIFAR-100", [82, 36, 20, 5, 93, 16, 94, 52, 72, 90]),
    "imagenet_r_5": (5, "ImageNet-R", [105, 6, 168, 90, 65, 159, 71, 165, 111, 179]),
    "imagenet_r_10": (10, "ImageNet-R", [105, 6, 168, 90, 65, 159, 71, 165, 111, 179]),
    "imagenet_r_20": (20, "ImageNet-R", [105, 6, 168, 90, 65, 159, 71, 165, 111, 179]),
    "domainnet_5": (5, "DomainNet", [105, 6, 168, 90, 65, 159, 71, 165, 111, 179]),
}


def real(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "runs" / f"{name}.yaml", overrides)


def tasks(name: str) -> list[ClassTaskConfig]:
    found = load_benchmark(shipped_benchmarks()[name]).tasks
    assert all(isinstance(task, ClassTaskConfig) for task in found)
    return [task for task in found if isinstance(task, ClassTaskConfig)]


@pytest.mark.parametrize(("number", "order"), [(1, ORDER_1), (2, ORDER_2)])
def test_mtil_orders_classes_splits_and_prompts(number: int, order: list[str]) -> None:
    stream = tasks(f"mtil_order{number}")
    assert load_benchmark(shipped_benchmarks()[f"mtil_order{number}"]).evaluate == "all"
    assert [task.name for task in stream] == order
    for task in stream:
        classes, train, test, template = MTIL[task.name]
        assert (task.classes, task.template) == (classes, template)
        assert task.records == {"train": train, "test": test}
        assert (task.train, task.test, task.names) == (f"{task.name}/train", f"{task.name}/test", {})
    assert tasks("mtil_order2") == [task for name in ORDER_2 for task in tasks("mtil_order1") if task.name == name]


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("mtil_order1_keeplora", [10] * 10 + [5]),
        ("mtil_order1_keeplora_plus", [5] * 11),
        ("mtil_order2_keeplora", [5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10]),
        ("mtil_order2_keeplora_plus", [5, 1, 1, 5, 5, 5, 5, 5, 5, 5, 5]),
    ],
)
def test_mtil_hyper_parameters(name: str, epochs: list[int]) -> None:
    config = real(name)
    training = config.training
    assert config.benchmark.name == name[: len("mtil_order1")]
    assert [config.epochs(task.name) for task in config.benchmark.tasks] == epochs
    assert {config.learning_rate(task.name) for task in config.benchmark.tasks} == {1e-3}
    assert training.head_learning_rate is None
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (16, 1, 0, None)
    assert (training.global_batch, training.weight_decay, training.temperature) == (64, 0.01, 1)
    assert (training.scheduler, training.warmup_ratio, training.max_grad_norm) == ("one_cycle", 0, 0)
    assert (config.seed, training.workers) == (42, 8)
    assert (config.images.resize, config.images.interpolation, config.images.augment) == (224, "bicubic", None)
    assert (config.measurement.ratio, config.measurement.batch_size) == (1, 64)
    assert (config.model.family, config.model.dtype) == ("clip", "float32")
    assert config.model.path == ROOT / "checkpoints" / "clip-vit-base-patch16"
    assert config.model.cosine_heads == name.endswith("plus")
    assert config.data_root == ROOT / "data"


@pytest.mark.parametrize(
    ("method", "protect", "side"),
    [
        ("keeplora_clip", "feature", {}),
        ("keeplora_clip_mean_feature", "mean_feature", {}),
        ("keeplora_clip_published", "mean_feature", {"weight_side": "output"}),
    ],
)
def test_keeplora_of_clip(method: str, protect: str, side: dict[str, str]) -> None:
    config = real("mtil_order1_keeplora", f"method={ROOT / 'configs' / 'methods' / method}.yaml")
    assert config.method.name == "keeplora"
    assert config.method.options == {
        "weight_energy": 0.85,
        "protect": protect,
        "energy": 0.99,
        "initialise": "gradient",
        "b": "gradient",
        **side,
    }
    assert config.method.parts == {"text": {"weight_energy": 0.2}}
    assert all(isinstance(build_method(config.method, part), KeepLora) for part in ("vision", "text"))
    assert real("mtil_order1_keeplora").method.options["protect"] == "feature"
    for order in (1, 2):
        published, ours = real(f"mtil_order{order}_keeplora_published"), real(f"mtil_order{order}_keeplora")
        assert published.method == real("mtil_order1_keeplora", f"method={PUBLISHED}").method
        assert published.training == ours.training
        assert published.benchmark == ours.benchmark


@pytest.mark.parametrize("name", INCREMENTAL)
def test_class_order_is_the_shuffle_of_seed_0(name: str) -> None:
    count, folder, beginning = INCREMENTAL[name]
    stream = tasks(name)
    order = np.arange(100 if name.startswith("cifar") else 200)
    np.random.Generator(np.random.PCG64(0)).shuffle(order)
    assert order[: len(beginning)].tolist() == beginning
    assert [list(task.classes) for task in stream if not isinstance(task.classes, int)] == order.reshape(
        count, -1
    ).tolist()
    assert {(task.train, task.test) for task in stream} == {(f"{folder}/train", f"{folder}/val")}
    assert load_benchmark(shipped_benchmarks()[name]).evaluate == "seen"
    records = [{"train": 5000, "test": 1000}] if name.startswith("cifar") else [{}]
    assert [task.records for task in stream] == records * count


@pytest.mark.parametrize("name", INCREMENTAL)
def test_splitlora_hyper_parameters(name: str) -> None:
    config = real(f"{name}_splitlora")
    training, cifar = config.training, name.startswith("cifar")
    assert config.benchmark.name == name
    assert config.seed == 0
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (10, 10, 0, None)
    assert (training.epochs, training.per_task) == (10 * 10, {})
    assert (training.learning_rate, training.head_learning_rate, training.temperature) == (1e-3, 1e-2, 30)
    assert (training.global_batch, training.weight_decay, training.max_grad_norm) == (256, 5e-5, 0)
    assert (training.scheduler, training.milestones, training.warmup_ratio) == ("steps", (0.4, 0.7), 0)
    assert config.images.augment == ("cifar10" if cifar else "imagenet")
    assert config.images.resize == ((224, 224) if cifar else (256, 256))
    assert config.images.interpolation == ("bicubic" if cifar else "bilinear")
    assert (config.measurement.ratio, config.evaluation.batch_size) == (1, 100)
    assert (config.method.name, config.method.options) == ("splitlora", {"alpha": 20, "initialise": "random"})
    assert (config.model.family, config.model.dtype) == ("vit", "float32")
    assert config.model.path == ROOT / "checkpoints" / "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert config.data_root == ROOT / "data"


@pytest.mark.parametrize("name", INCREMENTAL)
def test_inflora_hyper_parameters(name: str) -> None:
    """Its authors' lamb is 0.98 on ImageNet-R and 0.95 elsewhere, and rises to 1 over the number of tasks."""
    config, training = real(f"{name}_inflora"), real(f"{name}_inflora").training
    energy = 0.98 if name.startswith("imagenet_r") else 0.95
    assert (config.method.name, config.benchmark.name) == ("inflora", name)
    assert config.method.options == {"energy": energy, "growth": None, "spectrum": "moment"}
    assert config.lora == real(f"{name}_splitlora").lora
    assert config.images == real(f"{name}_splitlora").images
    if name == "domainnet_5":
        assert training == real("domainnet_5_splitlora").training
        return
    assert training.epochs == (50 if energy == 0.98 else 20)
    assert (training.learning_rate, training.head_learning_rate, training.temperature) == (5e-4, None, 1)
    assert (training.global_batch, training.weight_decay, training.scheduler) == (128, 0, "cosine")
