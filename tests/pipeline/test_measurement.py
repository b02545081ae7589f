"""Settings of `measurement`: what is refused before a run, bytes, and the same results wherever sums are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from llava_cl.errors import InputError
from llava_cl.pipeline.planning import Shapes, least_memory
from llava_cl.pipeline.preflight import check_plan, check_setup
from llava_cl.pipeline.samples import samples_of
from llava_cl.store import load_tensors
from runs import result_hashes, run_here, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    run_here(tiny_config(folder, tiny.run_content(folder)), folder / "device", until=1)
    return folder / "device"


@pytest.mark.parametrize("place", ["host", "1.0e-5"])
def test_files_do_not_depend_on_the_place_of_sums(folder: Path, undisturbed: Path, place: str) -> None:
    config = tiny_config(folder, tiny.run_content(folder), f"measurement.sums={place}")
    run_here(config, folder / f"sums-{place}", until=1)
    assert result_hashes(folder / f"sums-{place}") == result_hashes(undisturbed)


def test_a_sketch_starts_a_stage_elsewhere_but_protects_exactly(folder: Path, undisturbed: Path) -> None:
    rank = tiny_config(folder, tiny.run_content(folder)).lora.rank
    untrained = ("training.learning_rate=1e-30", "training.projector_learning_rate=null")
    config = tiny_config(folder, tiny.run_content(folder), f"measurement.sketch={rank}", *untrained)
    run_here(config, folder / "sketched", until=1)
    files = [output / "stages/01-Colour/initial_factors.safetensors" for output in (undisturbed, folder / "sketched")]
    exact, sketched = (load_tensors(file)[0] for file in files)
    assert exact.keys() == sketched.keys()
    factors = [name for name in exact if name.endswith(".a")]
    assert factors
    for name in factors:
        overlap = float((exact[name] @ sketched[name].T).square().sum()) / rank
        assert 0.1 < overlap < 0.9999, name
    run_here(tiny_config(folder, tiny.run_content(folder), *untrained), folder / "untrained", until=1)
    subspaces = [folder / run / "stages/01-Colour/subspace.safetensors" for run in ("sketched", "untrained")]
    assert subspaces[0].read_bytes() == subspaces[1].read_bytes()


def test_a_sketch_of_too_few_columns_is_refused(folder: Path) -> None:
    content = tiny.run_content(folder)
    config = tiny_config(folder, content, "lora.rank=3", "measurement.sketch=2")
    with pytest.raises(InputError, match=r"measurement\.sketch: a sketch of 2 columns does not hold the 3 directions"):
        check_plan(config, 1)
    check_plan(tiny_config(folder, content, "lora.rank=3", "measurement.sketch=3"), 1)


def test_a_bound_that_holds_no_sum_is_refused(folder: Path) -> None:
    """The largest weights are 24 x 40: 3840 bytes."""
    content = tiny.run_content(folder)
    with pytest.raises(InputError, match=r"measurement\.sums: 3\.8e-06 GB do not hold the gradient of model\."):
        check_setup(tiny_config(folder, content, "measurement.sums=3.8e-6"), 1)
    check_setup(tiny_config(folder, content, "measurement.sums=3.9e-6"), 1)


def test_a_bound_lowers_the_memory_that_a_run_needs(folder: Path) -> None:
    content = {**tiny.run_content(folder), "lora": {"rank": 1, "alpha": 1}}
    content["training"]["projector_learning_rate"] = None
    sums = 4 * 2 * (4 * 24 * 24 + 3 * 24 * 40)  # two blocks, by hand
    configs = (tiny_config(folder, content, f"measurement.sums={sums}") for sums in ("device", 2e-5))
    whole, bounded = (least_memory(config, Shapes.of(config, samples_of(config)), 1) for config in configs)
    assert whole - bounded >= sums - 20_000
