"""ViT checkpoints in both layouts against a plain forward pass, and the heads of a stream's tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from llava_cl.config import ClassTaskConfig, ModelConfig
from llava_cl.errors import InputError
from llava_cl.models import classifier_family, family, language_family
from llava_cl.training.statistics import save_memory, saves_memory

CPU, META = torch.device("cpu"), torch.device("meta")
WIDTH, BLOCKS, HIDDEN, SIDE, PATCH = 128, 3, 96, 24, 8
"""Two attention heads, nine patches."""
TASKS = tuple(
    ClassTaskConfig(name=name, train="train", test="test", classes=classes)
    for name, classes in (("A", ("a", "b")), ("B", ("c", "d", "e")), ("C", ("f", "g")))
)


def timm_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a plain ViT under timm's keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)

    weights = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
        "head.weight": draw(7, WIDTH),
        "head.bias": draw(7),
    }
    for block in range(BLOCKS):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", HIDDEN, WIDTH),
            ("mlp.fc2", WIDTH, HIDDEN),
        ):
            weights[f"blocks.{block}.{name}.weight"] = 2 * draw(rows, columns)
            weights[f"blocks.{block}.{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            weights[f"blocks.{block}.{name}.weight"] = 1 + draw(WIDTH)
            weights[f"blocks.{block}.{name}.bias"] = draw(WIDTH)
    return weights


def plain_features(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The class token after the last norm, written out in float64."""
    w = {key: tensor.double() for key, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = (
        pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    )  # [images, 3, rows, columns, patch, patch]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(pixels), -1, -1), tokens], dim=1) + w["pos_embed"]
    for block in range(BLOCKS):
        name = f"blocks.{block}"
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(WIDTH, dim=-1)
        answers = []
        for head in range(WIDTH // 64):
            part = slice(64 * head, 64 * (head + 1))
            attention = (query[..., part] @ key[..., part].transpose(1, 2) / 8).softmax(dim=-1)
            answers.append(attention @ value[..., part])
        x = x + linear(torch.cat(answers, dim=-1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def write_timm(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as timm publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"input_size": [3, SIDE, SIDE], "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2], "num_classes": 7}
    content = {"architecture": "vit_tiny", "num_classes": 7, "num_features": WIDTH, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(weights, folder / "model.safetensors")
    return folder


def transformers_model(weights: dict[str, torch.Tensor], kind: type = ViTModel, **options: Any) -> Any:
    """The same weights in a model of transformers."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=WIDTH // 64,
        intermediate_size=HIDDEN,
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        num_labels=7,
    )
    model = kind(config, **options)
    vit = model.vit if kind is ViTForImageClassification else model
    with torch.no_grad():
        vit.embeddings.cls_token.copy_(weights["cls_token"])
        vit.embeddings.position_embeddings.copy_(weights["pos_embed"])
        for name, module in (
            ("patch_embed.proj", vit.embeddings.patch_embeddings.projection),
            ("norm", vit.layernorm),
        ):
            module.weight.copy_(weights[f"{name}.weight"])
            module.bias.copy_(weights[f"{name}.bias"])
        for block, layer in enumerate(vit.layers):
            attention = layer.attention
            for number, module in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                rows = slice(number * WIDTH, (number + 1) * WIDTH)
                module.weight.copy_(weights[f"blocks.{block}.attn.qkv.weight"][rows])
                module.bias.copy_(weights[f"blocks.{block}.attn.qkv.bias"][rows])
            for name, module in (
                ("attn.proj", attention.o_proj),
                ("mlp.fc1", layer.mlp.fc1),
                ("mlp.fc2", layer.mlp.fc2),
                ("norm1", layer.layernorm_before),
                ("norm2", layer.layernorm_after),
            ):
                module.weight.copy_(weights[f"blocks.{block}.{name}.weight"])
                module.bias.copy_(weights[f"blocks.{block}.{name}.bias"])
    return model


def write_transformers(folder: Path, model: Any) -> Path:
    """A checkpoint in the layout of transformers."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3})
    )
    return folder


def vit(folder: Path, dtype: str = "float32") -> Any:
    return family(ModelConfig(family="vit", path=folder, dtype=dtype))


def _pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def _features(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return vit(folder).load(CPU).features(_pixels())


@pytest.fixture(scope="module")
def timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm(tmp_path_factory.mktemp("timm"), timm_weights())


def test_features_of_timms_layout_are_those_of_a_plain_forward(timm: Path) -> None:
    expected = plain_features(timm_weights(), _pixels())
    assert expected.std() > 0.3
    torch.testing.assert_close(_features(timm).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ViTModel, {"add_pooling_layer": False}), (ViTModel, {}), (ViTForImageClassification, {})],
    ids=["bare", "with pooler", "with classifier"],
)
def test_transformers_layout_gives_the_same_features(
    timm: Path, tmp_path: Path, kind: type, options: dict[str, Any]
) -> None:
    folder = write_transformers(tmp_path, transformers_model(timm_weights(), kind, **options))
    torch.testing.assert_close(_features(folder), _features(timm), rtol=0, atol=1e-5)


def test_image_spec_of_both_layouts(timm: Path, tmp_path: Path) -> None:
    spec = vit(timm).image_spec()
    assert (spec.size, spec.mean, spec.std) == (SIDE, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    folder = write_transformers(tmp_path, transformers_model(timm_weights(), add_pooling_layer=False))
    spec = vit(folder).image_spec()
    assert (spec.size, spec.mean, spec.std) == (SIDE, (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))


def test_the_base_is_frozen_and_its_keys_and_values_are_adapted(timm: Path) -> None:
    own = vit(timm)
    model = own.load(CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    targets = own.linear_targets(model)
    assert len(targets) == 2 * BLOCKS
    weights = timm_weights()
    for number, (name, target) in enumerate(sorted(targets.items())):
        block, place = divmod(number, 2)
        rows = slice((1 + place) * WIDTH, (2 + place) * WIDTH)
        assert torch.equal(target.module.weight, weights[f"blocks.{block}.attn.qkv.weight"][rows]), name
        assert model.get_submodule(name) is target.module
    sources = [target.source for _, target in sorted(targets.items())]
    assert sources[::2] == sources[1::2]
    assert len(set(sources)) == BLOCKS
    skeleton = own.skeleton()
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


Change = Callable[[dict[str, torch.Tensor]], object]
DAMAGES: dict[str, tuple[Change, str]] = {
    "a block's bias missing": (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"missing.*\b1\..*fc2\.bias"),
    "queries, keys and values missing": (lambda w: w.pop("blocks.2.attn.qkv.weight"), r"missing.*\b2\.att.*weight"),
    "a whole block missing": (
        lambda w: [w.pop(key) for key in list(w) if key.startswith("blocks.1.")],
        r"missing.*\b1\.att",
    ),
    "last norm missing": (lambda w: w.pop("norm.weight"), r"missing.*norm\.weight"),
    "class token missing": (lambda w: w.pop("cls_token"), "missing.*cls_token"),
    "positions missing": (lambda w: w.pop("pos_embed"), "pos_embed is missing"),
    "patches missing": (lambda w: w.pop("patch_embed.proj.weight"), r"patch_embed\.proj\.weight is missing"),
    "registers": (lambda w: w.update(reg_token=torch.zeros(1, 4, WIDTH)), "unexpected.*reg_token"),
    "layer scales": (
        lambda w: w.update({"blocks.0.ls1.gamma": torch.zeros(WIDTH)}),
        r"unexpected.*blocks\.0\.ls1\.gamma",
    ),
    "norms of queries": (
        lambda w: w.update({"blocks.0.attn.q_norm.weight": torch.zeros(64)}),
        r"unexpected.*blocks\.0\.attn\.q_norm\.weight",
    ),
    "a narrow layer": (
        lambda w: w.update({"blocks.1.mlp.fc2.weight": torch.zeros(WIDTH, 5)}),
        r"mismatched.*\b1\..*fc2",
    ),
    "queries alone": (
        lambda w: w.update({"blocks.0.attn.qkv.weight": torch.zeros(WIDTH, WIDTH)}),
        r"mismatched.*\b0\.att",
    ),
    "positions of no square": (lambda w: w.update(pos_embed=torch.zeros(1, 9, WIDTH)), "mismatched.*position"),
    "patches of a linear": (
        lambda w: w.update({"patch_embed.proj.weight": torch.zeros(WIDTH, 3 * PATCH * PATCH)}),
        r"patch_embed\.proj\.weight",
    ),
}


@pytest.mark.parametrize("device", [CPU, META], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, damage: str, device: torch.device) -> None:
    change, named = DAMAGES[damage]
    weights = timm_weights()
    change(weights)
    folder = write_timm(tmp_path / "model", weights)
    with pytest.raises(InputError, match=named) as error:
        vit(folder).load(device)
    assert all(str(folder) in problem for problem in error.value.problems)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_keys_of_transformers_layout_that_do_not_fit_are_named(tmp_path: Path, damage: str) -> None:
    folder = write_transformers(tmp_path, transformers_model(timm_weights(), add_pooling_layer=False))
    weights = load_file(folder / "model.safetensors")
    key = next(name for name in sorted(weights) if "1." in name and name.endswith(("key.weight", "k_proj.weight")))
    if damage == "missing":
        del weights[key]
    else:
        weights["encoder.layer.1.odd.weight" if damage == "extra" else key] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    named = {"missing": r"missing.*\b1\.att", "extra": r"unexpected.*1\.odd", "shape": r"mismatched.*\b1\.att"}
    for device in (CPU, META):
        with pytest.raises(InputError, match=named[damage]):
            vit(folder).load(device)


def test_files_that_cannot_be_read_are_named(timm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        vit(tmp_path)
    folder = write_timm(tmp_path / "cut", timm_weights())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"model\.safetensors: the weights cannot be read"):
        vit(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        vit(folder)
    folder = write_timm(tmp_path / "bare", timm_weights())
    content = json.loads((folder / "config.json").read_text())
    del content["pretrained_cfg"]["mean"], content["pretrained_cfg"]["std"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        vit(folder).image_spec()
    assert [problem.rpartition(" is ")[0].rpartition(".")[2] for problem in error.value.problems] == ["mean", "std"]


def _with_heads(folder: Path, tasks: tuple[int, ...] = (0, 1, 2), dtype: str = "float32") -> tuple[Any, Any]:
    """The family and its model with random heads for some of the tasks."""
    own = vit(folder, dtype)
    model = own.load(CPU)
    own.install(model, TASKS)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for task, head in enumerate(model.heads):
            weight, bias = (
                torch.randn(head.weight.shape, generator=generator),
                torch.randn(len(head.bias), generator=generator),
            )
            if task in tasks:
                head.weight.copy_(weight)
                head.bias.copy_(bias)
    return own, model


def _scores(own: Any, model: Any, tasks: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return own.scorer(model, tasks)(_pixels())


def test_heads_are_installed_as_zeros_and_frozen(timm: Path) -> None:
    own = vit(timm)
    for model in (own.load(CPU), own.skeleton()):
        own.install(model, TASKS)
        assert [own.head(task) for task in range(3)] == ["heads.0", "heads.1", "heads.2"]
        heads = [model.get_submodule(own.head(task)) for task in range(3)]
        assert [(head.in_features, head.out_features) for head in heads] == [(WIDTH, 2), (WIDTH, 3), (WIDTH, 2)]
        assert not any(parameter.requires_grad for head in heads for parameter in head.parameters())
        assert heads[0].weight.is_meta or not any(parameter.any() for head in heads for parameter in head.parameters())


def test_scores_are_those_of_the_tasks_heads_in_order(timm: Path) -> None:
    own, model = _with_heads(timm)
    features = plain_features(timm_weights(), _pixels())
    single = [features @ head.weight.double().T + head.bias.double() for head in model.heads]
    for tasks in ((0,), (1,), (0, 1, 2), (2, 0)):
        expected = torch.cat([single[task] for task in tasks], dim=1)
        torch.testing.assert_close(_scores(own, model, tasks).double(), expected.detach(), rtol=0, atol=1e-4)


def test_a_head_starts_small_and_by_the_generator_alone(timm: Path) -> None:
    own = vit(timm)
    model = own.load(CPU)
    own.install(model, TASKS)

    def start(seed: int) -> dict[str, torch.Tensor]:
        return own.head_start(model, 1, None, torch.Generator().manual_seed(seed))

    first = start(0)
    assert {name: value.shape for name, value in first.items()} == {"weight": (3, WIDTH), "bias": (3,)}
    assert first["weight"].std() == pytest.approx(0.02, rel=0.1)
    assert first["weight"].mean().abs() < 4e-3
    assert not first["bias"].any()
    assert torch.equal(first["weight"], start(0)["weight"])
    assert not torch.equal(first["weight"], start(1)["weight"])
    assert not any(parameter.any() for parameter in model.heads.parameters())


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_an_export_gives_plain_transformers_the_same_scores(timm: Path, tmp_path: Path, layout: str) -> None:
    folder = timm
    if layout == "transformers":
        folder = write_transformers(tmp_path / "base", transformers_model(timm_weights(), add_pooling_layer=False))
    own, model = _with_heads(folder)
    (tmp_path / "out").mkdir()
    own.save(model, tmp_path / "out", "hf")
    plain = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(_pixels()).logits, _scores(own, model, (0, 1, 2)), rtol=0, atol=1e-5)
    assert plain.config.num_labels == 7
    names = [name for task in model.class_names for name in task]
    assert plain.config.id2label == dict(enumerate(names))
    assert plain.classifier.out_features == 7


def test_an_export_holds_the_learned_tasks_alone(timm: Path, tmp_path: Path) -> None:
    own, model = _with_heads(timm, (0, 1))
    own.save(model, tmp_path, "hf")
    plain = ViTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(_pixels()).logits, _scores(own, model, (0, 1)), rtol=0, atol=1e-5)
    own, model = _with_heads(timm, ())
    with pytest.raises(InputError, match="give a stage from 1"):
        own.save(model, tmp_path, "hf")


def test_an_export_is_a_checkpoint_again(timm: Path, tmp_path: Path) -> None:
    own, model = _with_heads(timm)
    own.save(model, tmp_path, "hf")
    torch.testing.assert_close(_features(tmp_path), _features(timm), rtol=0, atol=1e-6)
    assert vit(tmp_path).image_spec() == own.image_spec()


def test_the_precision_of_the_base_is_kept(tmp_path: Path) -> None:
    half = {key: tensor.bfloat16() for key, tensor in timm_weights().items()}
    folder = write_timm(tmp_path / "half", half)
    own, model = _with_heads(folder, dtype="auto")
    (tmp_path / "out").mkdir()
    own.save(model, tmp_path / "out", "hf")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in vit(folder).load(CPU).parameters()} == {torch.float32}


def test_a_vit_tells_classes_and_does_not_speak(timm: Path, tiny_run: Path) -> None:
    settings = ModelConfig(family="vit", path=timm)
    assert classifier_family(settings).layouts == ("hf",)
    with pytest.raises(InputError, match="'vit' tells classes, but the tasks are instructions"):
        language_family(settings)
    with pytest.raises(InputError, match="'llava' answers in words, but the tasks are classes of images"):
        classifier_family(ModelConfig(path=tiny_run / "model"))


def test_another_kind_of_checkpoint_is_refused(tiny_run: Path) -> None:
    with pytest.raises(InputError, match="model_type is 'llava', expected 'vit'"):
        vit(tiny_run / "model")


def test_gradient_checkpointing_changes_no_gradient(timm: Path) -> None:
    slopes = []
    for checkpointing in (False, True):
        own, model = _with_heads(timm)
        own.learn(model, 1, 1.0)
        if checkpointing:
            save_memory(model)
        model.train()
        assert saves_memory(model) is checkpointing
        weights = [target.module.weight.requires_grad_(True) for target in own.linear_targets(model).values()]
        model(pixel_values=_pixels(), labels=torch.tensor([0, 1, 2, -100]))["loss"].backward()
        slopes.append([weight.grad for weight in weights])
    for plain, checkpointed in zip(*slopes, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


def test_the_plain_forward_notices_what_matters() -> None:
    """The reference would not be one if a permutation of heads or of query, key and value left it as it is."""
    weights = timm_weights()
    before = plain_features(weights, _pixels())
    rolled = {**weights, "blocks.0.attn.qkv.weight": weights["blocks.0.attn.qkv.weight"].roll(WIDTH, 0)}
    shifted = {**weights, "pos_embed": weights["pos_embed"].roll(1, 1)}
    for changed in (rolled, shifted):
        assert (plain_features(changed, _pixels()) - before).abs().max() > 0.05
