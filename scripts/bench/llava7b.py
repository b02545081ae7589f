"""Time and memory of every step of a stage at the size of LLaVA-1.5-7B, in our form and in the published code's.

    python scripts/bench/llava7b.py --output runs/llava7b             # one GPU
    torchrun --nproc_per_node 4 scripts/bench/llava7b.py --output runs/llava7b
    python scripts/bench/llava7b.py --output runs/llava7b --tiny      # a toy model, also without a GPU

Needs neither network nor checkpoint: the shapes are LLaVA-1.5-7B's, the weights random, made on the device. Samples
have an image and 60 tokens of text, of which 8 are supervised; answers have 10 tokens. Beside torch, transformers, peft
and accelerate it needs pydantic, and psutil and PyYAML where they are missing. To bring them for Python 3.12 on x86-64:

    pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 --dest wheels \
        pydantic psutil pyyaml
    pip install --no-index --find-links wheels pydantic psutil pyyaml     # on the machine with the GPU

What is timed: measuring (`llava_cl.training.statistics.measure`), the decompositions of the first layer of each shape,
times the number of such layers, training by the Trainer of a stage, generation, and one load of the model from a
checkpoint that is written first. Training runs without DeepSpeed, with adapters in the model's precision as under it.
The published code's form is in `llava7b_reference.py`.

MFU = F * s / (t * R), where F = floating point operations of forward and backward of one sample (torch's counter;
nothing is computed twice: with frozen weights forward and the gradients of inputs, and of what is trained), s = samples
of an optimizer step on one rank, t = its median seconds, R = the measured rate of a bf16 product of two 8192 x 8192
matrices. Recomputation is not counted as useful.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics as stats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llava7b_reference as reference
import torch
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_cl.config import RunConfig, validate_config
from llava_cl.distributed import World, init_world, shutdown
from llava_cl.methods import LayerStatistics, LoraFactors, Methods
from llava_cl.models import language_family
from llava_cl.models.supervised import supervised
from llava_cl.pipeline.activations import Size
from llava_cl.pipeline.duration import matmul_rate
from llava_cl.pipeline.planning import predict_memory
from llava_cl.pipeline.samples import TrainedModule
from llava_cl.store import read_json, write_json
from llava_cl.subspace import full_precision
from llava_cl.training.adapters import attach
from llava_cl.training.statistics import GRADIENT, measure, save_memory
from llava_cl.training.trainer import TrainingPlan, train

TEXT, ANSWER, NEW_TOKENS = 60, 8, 10
SAMPLES, QUESTIONS, TASKS, GPUS, LOADS = 40_000, 3_000, 6, 4, 1
"""UCIT: training samples and questions of a task, tasks; GPUs of the projected run; loads of the model in our stage."""


def architecture(tiny: bool) -> LlavaConfig:
    """LLaVA-1.5-7B, or the same with hardly anything in it."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    size, vocabulary = {"image_size": 336, "patch_size": 14}, 32_064
    if tiny:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
        size, vocabulary = {"image_size": 28, "patch_size": 14}, 512
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, **size),
        text_config=LlamaConfig(vocab_size=vocabulary, **text, pad_token_id=0, bos_token_id=1, eos_token_id=None),
        image_token_index=vocabulary - 64,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def configured(folder: Path, steps: int, ranks: int, micro_batch: int) -> RunConfig:
    """UCIT's hyper-parameters on the model of a folder, for `steps` optimizer steps."""
    task = {"name": "Bench", "train": "none.json", "test": "none.json", "images": ".", "scorer": "exact"}
    return validate_config(
        {
            "name": "llava7b",
            "benchmark": {"name": "bench", "tasks": [task]},
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "method": {"name": "keeplora"},
            "data_root": str(folder),
            "lora": {"rank": 32, "alpha": 8, "dropout": 0.05},
            "training": {
                "learning_rate": 2e-4,
                "projector_learning_rate": 2e-5,
                "global_batch": 2 * micro_batch * ranks,
                "micro_batch": micro_batch,
                "gradient_checkpointing": False,
            },
            "measurement": {"ratio": 0.2, "batch_size": 8},
            "evaluation": {"batch_size": 16, "max_new_tokens": NEW_TOKENS},
        },
        "bench",
    )


class Bench:
    """The model, its samples, and what has been timed."""

    def __init__(self, folder: Path, *, tiny: bool, world: World) -> None:
        self.world, self.tiny = world, tiny
        self.steps, self.batches, self.singles = (2, 1, 2) if tiny else (6, 8, 16)
        self.folder = folder / "checkpoint"
        self.architecture = architecture(tiny)
        if world.is_main:
            self.architecture.save_pretrained(self.folder)
        if world.size > 1:
            torch.distributed.barrier()
        self.config = configured(self.folder, self.steps, world.size, micro_batch=2 if tiny else 8)
        self.family = language_family(self.config.model)
        vision = self.architecture.vision_config
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.ours: dict[str, Any] = {}
        self.reference: dict[str, Any] = {}

    def build(self) -> Any:
        """The model with random weights, as a family's `load` gives it."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            torch.manual_seed(0)
            with self.world.device:
                model: Any = LlavaForConditionalGeneration(self.architecture)
        finally:
            torch.set_default_dtype(before)
        supervised(model)
        return model.requires_grad_(False).eval()

    def sample(self) -> dict[str, Any]:
        """A training sample: the image first, then text, whose last tokens are supervised."""
        text = torch.randint(5, self.image_token // 2, (TEXT,))
        ids = torch.cat([torch.ones(1, dtype=torch.long), torch.full((self.image_tokens,), self.image_token), text[1:]])
        labels = ids.clone()
        labels[:-ANSWER] = -100
        side = self.architecture.vision_config.image_size
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, side, side)}

    @property
    def image_token(self) -> int:
        """The id that stands for a piece of the image."""
        return int(self.architecture.image_token_index)

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """A collated batch on the device."""
        return {
            key: value.to(self.world.device) for key, value in collate([self.sample() for _ in range(size)]).items()
        }

    def timed(self, form: dict[str, Any], step: str, run: Callable[[], Any]) -> Any:
        """Runs a step; records its seconds and the largest memory."""
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.world.device)
        with self.clock(form, step):
            made = run()
        if self.world.device.type == "cuda":
            form[f"{step}_peak_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        return made

    def clock(self, form: dict[str, Any], step: str) -> Any:
        """A block whose seconds are recorded."""
        return _Clock(form, f"{step}_seconds", self.world.device)

    def loading(self) -> None:
        """One load from a checkpoint of the same weights."""
        if self.world.is_main:
            model = self.build()
            model.save_pretrained(self.folder)
            del model
        if self.world.size > 1:
            torch.distributed.barrier()
        self.timed(self.ours, "load", lambda: self.family.load(self.world.device))
        self.reference["load_seconds"] = self.ours["load_seconds"]

    def measuring(self, model: Any) -> dict[str, torch.Tensor]:
        """Gradients of all adapted linears; returns those of the layers that are decomposed."""
        targets = self.family.linear_targets(model)
        size = self.config.measurement.batch_size

        def ours(count: int) -> Any:
            batches = [
                {**self.batch(size), "index": torch.arange(size, device=self.world.device)} for _ in range(count)
            ]
            return measure(
                model,
                batches,
                targets,
                wanted=frozenset({GRADIENT}),
                owners=dict.fromkeys(targets, 0),
                world=self.world,
                entries=self.family.entries(model),
                token_mask=self.family.token_mask,
            )

        ours(1)
        found = self.timed(self.ours, "measure", lambda: ours(self.batches))
        self.ours["measure_seconds_per_sample"] = self.ours["measure_seconds"] / (self.batches * size)
        kept = {name: found.gradients[name] for name in self.kinds(targets) if name in found.gradients}
        del found
        weights = [target.module.weight for target in targets.values()]
        samples = [self.batch(1) for _ in range(self.singles)]
        reference.gradients(model, samples[:1], weights)
        self.timed(self.reference, "measure", lambda: reference.gradients(model, samples, weights))
        self.reference["measure_seconds_per_sample"] = self.reference["measure_seconds"] / self.singles
        return kept

    @staticmethod
    def kinds(targets: Any) -> dict[str, int]:
        """The first layer of each shape -> how many layers have it."""
        first: dict[torch.Size, str] = {}
        counts: dict[str, int] = {}
        for name, target in targets.items():
            name = first.setdefault(target.module.weight.shape, name)
            counts[name] = counts.get(name, 0) + 1
        return counts

    def decomposing(self, model: Any, gradients: dict[str, torch.Tensor]) -> None:
        """What the stages do with one layer of each shape, times the layers of that shape, on one rank."""
        method, rank = Methods(self.config.method).of(""), self.config.lora.rank
        counts = self.kinds(self.family.linear_targets(model))
        totals = {(form, what): 0.0 for form in ("ours", "reference") for what in ("base", "stage")}
        with full_precision():
            for name, gradient in gradients.items():
                weight, times = model.get_submodule(name).weight.detach().float(), counts[name]
                known = LayerStatistics(tasks=1, gradient=gradient)
                seconds: dict[str, Any] = {}
                with self.clock(seconds, "base"):
                    basis = method.initial_basis(weight)
                with self.clock(seconds, "stage"):
                    method.initialise(tuple(weight.shape), rank, known, basis, torch.Generator().manual_seed(0))
                    method.protect(known, basis)
                for what in ("base", "stage"):
                    totals["ours", what] += times * seconds[f"{what}_seconds"]
                with self.clock(seconds, "base"):
                    plain = reference.initial_basis(weight, 0.6)
                with self.clock(seconds, "stage"):
                    reference.initial_a(gradient, plain, rank)
                    reference.grown_basis(gradient, plain, 0.99)
                for what in ("base", "stage"):
                    totals["reference", what] += times * seconds[f"{what}_seconds"]
        for (form, what), value in totals.items():
            getattr(self, form)[f"decompose_{what}_seconds"] = value

    def training(self, model: Any) -> None:
        """Optimizer steps of the stage's Trainer, then of a plain loop in the published form."""
        self.ours["flops_per_sample"] = self._count_flops(model)
        dataset = _Samples([self.sample() for _ in range(self.config.training.global_batch * self.steps)])
        marks: list[float] = []

        def mark(done: int, total: int) -> None:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            marks.append(time.perf_counter())

        plan = TrainingPlan(1, 2e-4, 0, 2e-5, recompute=False)
        lengths, scratch = [TEXT] * len(dataset), self.folder.parent / "scratch"
        adapted = self._adapted(model)
        self.timed(
            self.ours,
            "training",
            lambda: train(
                adapted,
                dataset,
                lengths,
                collate,
                self.config,
                plan,
                deepspeed=None,
                world=self.world,
                folder=scratch,
                progress=mark,
            ),
        )
        rest = [later - earlier for earlier, later in itertools.pairwise(marks)]
        self.ours["train_seconds_per_step"] = stats.median(rest)
        save_memory(model)
        adapted.train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4)
        micro = self.config.training.micro_batch
        batches = [self.batch(micro) for _ in range(2)]
        reference.train_step(model, batches, optimizer)
        self.timed(self.reference, "train", lambda: reference.train_step(model, batches, optimizer))
        self.reference["train_seconds_per_step"] = self.reference["train_seconds"]

    def _adapted(self, model: Any) -> Any:
        generator, rank = torch.Generator().manual_seed(0), self.config.lora.rank
        factors = {}
        for name, target in self.family.linear_targets(model).items():
            a = torch.randn(rank, target.module.in_features, generator=generator) / target.module.in_features**0.5
            factors[name] = LoraFactors(a, torch.zeros(target.module.out_features, rank))
        return attach(
            model,
            factors,
            self.config.lora,
            train_a=False,
            projector=self.family.projector_prefix(),
            fp32_adapters=False,
        )

    def _count_flops(self, model: Any) -> float:
        """Of forward and backward of one sample; adapters add less than one percent."""
        hook = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
        with FlopCounterMode(display=False) as counter:
            model(**{key: value for key, value in self.batch(1).items() if key != "index"})["loss"].backward()
        hook.remove()
        return float(counter.get_total_flops())

    def generating(self, model: Any) -> None:
        """Answers of fixed length to questions, in a batch and one at a time."""
        size = self.config.evaluation.batch_size
        for form, count, times in ((self.ours, size, 1), (self.reference, 1, self.singles // 2)):
            prompts = self.batch(count)
            del prompts["labels"]

            def answer(prompts: dict[str, torch.Tensor] = prompts, times: int = times) -> None:
                with torch.inference_mode():
                    for _ in range(times):
                        self.family.generate(model, prompts, NEW_TOKENS)

            answer()
            self.timed(form, "generate", answer)
            form["generate_seconds_per_question"] = form["generate_seconds"] / (count * times)

    def predicted(self) -> dict[str, int]:
        """Memory of a rank that `llava_cl.pipeline.planning` predicts for the steps, in bytes."""
        size = Size(self.image_tokens + TEXT, ANSWER)
        device, ranks = self.world.device, self.world.size
        found = predict_memory(self.config, _Shape(self.family), size, ranks=ranks, device=device, recompute=False)
        return {step: sum(parts.values()) for step, parts in found.items()}

    def result(self) -> dict[str, Any]:
        """All figures, and a whole UCIT run on four GPUs projected from them."""
        micro = 2 * self.config.training.micro_batch
        rate = matmul_rate(self.world.device, "bfloat16", 256 if self.tiny else None)
        self.ours["mfu"] = self.ours["flops_per_sample"] * micro / (self.ours["train_seconds_per_step"] * rate)
        forms = {"ours": self.ours, "reference": self.reference}
        projection = {
            name: project(form, micro, LOADS if form is self.ours else reference.LOADS) for name, form in forms.items()
        }
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        return {
            "device": device,
            "tiny": self.tiny,
            "ranks": self.world.size,
            "torch": torch.__version__,
            "matmul_flops_per_second": rate,
            **forms,
            "predicted_bytes": self.predicted(),
            "ucit_on_four_gpus_seconds": projection,
            "whole_stage_ratio": sum(projection["reference"].values()) / sum(projection["ours"].values()),
        }


def project(form: dict[str, Any], samples_per_step: int, loads: int) -> dict[str, float]:
    """Seconds of a UCIT run on four GPUs, every task evaluated after every stage; decompositions shared out evenly."""
    each = TASKS * SAMPLES / GPUS
    return {
        "measure": 2 * 0.2 * each * form["measure_seconds_per_sample"],
        "decompose": (form["decompose_base_seconds"] + TASKS * form["decompose_stage_seconds"]) / GPUS,
        "train": each / samples_per_step * form["train_seconds_per_step"],
        "generate": TASKS * TASKS * QUESTIONS / GPUS * form["generate_seconds_per_question"],
        "load": TASKS * loads * form["load_seconds"],
    }


class _Clock:
    """A block whose seconds are written down."""

    def __init__(self, into: dict[str, Any], key: str, device: torch.device) -> None:
        self._into, self._key, self._device = into, key, device

    def __enter__(self) -> None:
        self._wait()
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._into[self._key] = time.perf_counter() - self._begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Samples(Dataset[dict[str, Any]]):
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index]


class _Shape:
    """What planning asks of a stream's samples."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def prepare(self, model: Any) -> None:
        """Nothing."""

    def choose(self, model: Any, stage: int) -> None:
        """Nothing."""

    def beside(self, stage: int) -> TrainedModule:
        """The projector."""
        return TrainedModule(self.family.projector_prefix(), 2e-5)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Samples of one length as a batch."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result as a Markdown table."""
    yield "| | ours | published form | ratio |"
    yield "|---|---|---|---|"
    rows = (
        ("measure, ms a sample", "measure_seconds_per_sample"),
        ("bases of the base, s", "decompose_base_seconds"),
        ("decompositions of a stage, s", "decompose_stage_seconds"),
        ("train, ms a step", "train_seconds_per_step"),
        ("generate, ms a question", "generate_seconds_per_question"),
    )
    for label, key in rows:
        factor = 1e3 if label.split(", ")[1].startswith("ms") else 1.0
        ours, theirs = (factor * result[form][key] for form in ("ours", "reference"))
        yield f"| {label} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f} |"
    ours, theirs = (sum(result["ucit_on_four_gpus_seconds"][form].values()) / 3600 for form in ("ours", "reference"))
    yield f"| UCIT on four GPUs, projected, h | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Times every step and writes `llava7b.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the result, and a checkpoint of 14 GB")
    parser.add_argument("--tiny", action="store_true", help="a toy model; for the CPU")
    chosen = parser.parse_args(arguments)
    folder = chosen.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    world = init_world(use_deepspeed=False)
    if world.device.type == "cpu" and not chosen.tiny:
        parser.error("there is no GPU; give --tiny")
    bench = Bench(folder, tiny=chosen.tiny, world=world)
    bench.loading()
    model = bench.build()
    bench.generating(model)
    bench.decomposing(model, bench.measuring(model))
    bench.training(model)
    del model
    result = bench.result()
    if world.is_main:
        write_json(folder / "llava7b.json", result)
        predicted = result["predicted_bytes"]
        pairs = (
            ("measure", "measure_peak_bytes"),
            ("train", "training_peak_bytes"),
            ("evaluate", "generate_peak_bytes"),
        )
        print(f"{result['device']}: MFU of training {result['ours']['mfu']:.1%}")
        for step, key in pairs:
            measured = result["ours"].get(key)
            told = f"{measured / 1e9:.2f} GB" if measured else "only on a GPU"
            print(f"memory, {step}: predicted {predicted[step] / 1e9:.2f} GB, measured {told}")
        costs = result["ucit_on_four_gpus_seconds"]["ours"]
        largest = max(costs, key=lambda step: costs[step])
        print(f"largest cost of our run: {largest}, {costs[largest] / sum(costs.values()):.0%}")
        print("\n".join(table(result)))
    shutdown()
    return read_json(folder / "llava7b.json") if world.is_main else {}


if __name__ == "__main__":
    main()
