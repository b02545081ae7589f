"""Grouping of layers by kind for the basis maps."""

import re

import pytest

from llava_cl.report.basis import basis_panels, split_name
from llava_cl.report.schema import LayerBasis, StageCost


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.11.self_attn.q_proj", (("model", "layers"), 11, "self_attn.q_proj")),
        ("encoder.0.blocks.3.attn", (("encoder", "0", "blocks"), 3, "attn")),
        ("projector.linear_1", ((), 0, "projector.linear_1")),
    ],
)
def test_names_split_at_their_last_number(name: str, parts: tuple[tuple[str, ...], int, str]) -> None:
    assert tuple(split_name(name)) == parts


def fill(layer: LayerBasis) -> float:
    return layer.fill


def stage(number: int, basis: dict[str, int]) -> StageCost:
    layers = {name: {"columns": columns, "added": 0, "of": 10, "energy": None} for name, columns in basis.items()}
    return StageCost.model_validate({"stage": number, "task": "t", "seconds": {}, "basis": layers})


def test_one_panel_a_kind_with_the_latest_mean() -> None:
    first = {"a.0.q": 1, "a.1.q": 3, "a.0.v": 5}
    second = {"a.0.q": 2, "a.1.q": 6, "a.0.v": 9}
    drawn = basis_panels([stage(1, first), stage(2, second), stage(3, {})], fill, "rank")
    captions = [re.findall(r"<span>(.*?)</span><b>(.*?)</b>", panel)[0] for panel in drawn]
    assert captions == [("q", "40.0%"), ("v", "90.0%")]


def test_towers_are_told_apart_by_what_differs() -> None:
    names = ["vision.encoder.layers.0.q", "text.encoder.layers.0.q", "text.encoder.layers.1.q"]
    drawn = basis_panels([stage(1, dict.fromkeys(names, 1))], fill, "rank")
    assert [re.findall(r"<span>(.*?)</span>", panel)[0] for panel in drawn] == ["vision q", "text q"]


def test_blocks_are_in_the_order_of_their_numbers() -> None:
    (drawn,) = basis_panels([stage(1, {f"a.{block}.q": block for block in (10, 9, 0, 1)})], fill, "rank")
    opacities = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', drawn)]
    columns = [float(value) for value in re.findall(r'class="fill"[^>]*d="M([\d.]+) ', drawn)]
    assert opacities == sorted(opacities)
    assert columns == sorted(columns)


def test_methods_without_a_basis_have_no_panel() -> None:
    assert basis_panels([stage(1, {})], fill, "rank") == []


def test_layers_whose_value_is_not_known_are_left_out() -> None:
    layers = {"a.0.q": {"columns": 1, "added": 1, "of": 4, "energy": 0.5}, "a.1.q": {"columns": 1, "added": 1, "of": 4}}
    known = StageCost.model_validate({"stage": 1, "task": "t", "basis": layers})
    (drawn,) = basis_panels([known], lambda layer: layer.energy, "protected energy")
    assert "<b>50.0%</b>" in drawn
    assert drawn.count('class="fill"') == 1
    assert basis_panels([stage(1, {"a.0.q": 1})], lambda layer: layer.energy, "protected energy") == []


def test_columns_that_are_more_than_dimensions_fill_a_layer_at_the_most() -> None:
    """Of runs that recorded how many there are, and not what they span."""
    assert LayerBasis(columns=12, added=4, of=8).fill == 1
    assert LayerBasis(columns=2, added=4, of=8).fill == 0.25
