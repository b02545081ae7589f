"""Orders against LLaVA's sampler on stored cases; global batches that do not depend on the number of ranks."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cl.data import GlobalBatchSampler, length_grouped_indices, measurement_indices, modality_lengths
from llava_cl.data.records import TrainRecord
from llava_cl.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "sampler" / "cases.json").read_text())["cases"]
LENGTHS = st.lists(st.integers(-40, 40).filter(bool), min_size=1, max_size=90)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['seed']}")
def test_golden_orders(case):
    size, world = case["per_device_batch"], case["sampler_world"]
    generator = torch.Generator().manual_seed(case["seed"])
    assert length_grouped_indices(case["lengths"], size, world, generator) == case["indices"]
    torch.manual_seed(case["seed"])
    assert length_grouped_indices(case["lengths"], size, world, None) == case["indices"]


def test_golden_lengths():
    for line in (GOLDEN / "conversations" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        record = sample["record"]
        images = (record["image"],) if "image" in record else ()
        lengths = modality_lengths([TrainRecord(record["id"], images, tuple(record["conversations"]))])
        assert lengths == [sample["modality_length"]]


def test_zero_length_is_refused():
    with pytest.raises(InputError, match=r"record\[1\]"):
        length_grouped_indices([3, 0, 2], 2, 1, None)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 4), groups=st.integers(1, 4))
def test_full_batches_hold_one_modality_and_every_sample_once(lengths, size, groups):
    order = length_grouped_indices(lengths, size, groups, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(len(lengths)))
    mega = size * groups
    images = sum(length > 0 for length in lengths)
    texts = len(lengths) - images
    pure = (max(images - 1, 0) // mega + max(texts - 1, 0) // mega) if images and texts else len(lengths) // mega
    for start in range(0, pure * mega, mega):
        assert len({lengths[index] > 0 for index in order[start : start + mega]}) == 1


def global_batches(lengths, size, micro, world, *, seed=3, epoch=0):
    """The samples of each optimizer step, over all ranks."""
    samplers = [GlobalBatchSampler(lengths, size, micro, rank, world, seed) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    runs = [list(sampler) for sampler in samplers]
    assert len({len(run) for run in runs}) == 1
    assert all(len(run) == len(sampler) for run, sampler in zip(runs, samplers, strict=True))
    steps = samplers[0].accumulation_steps
    assert len(runs[0]) % steps == 0
    return [
        [run[step] for step in range(start, start + steps) for run in runs] for start in range(0, len(runs[0]), steps)
    ]


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, micro=st.integers(1, 3), epoch=st.integers(0, 2))
def test_global_batches_are_the_same_for_any_number_of_ranks(lengths, micro, epoch):
    alone = global_batches(lengths, 4 * micro, micro, 1, epoch=epoch)
    for world in (2, 4):
        assert global_batches(lengths, 4 * micro, micro, world, epoch=epoch) == alone
    samples = Counter(index for batch in alone for micro_batch in batch for index in micro_batch if index != -1)
    assert samples == Counter(range(len(lengths)))
    for batch in alone:
        assert len(batch) == 4
        assert all(micro_batch == [-1] or -1 not in micro_batch for micro_batch in batch)
        assert all(0 < len(micro_batch) <= micro for micro_batch in batch)
    assert all(index != -1 for batch in alone[:-1] for micro_batch in batch for index in micro_batch)


def test_order_follows_seed_and_epoch():
    lengths = list(range(1, 60))

    def order(seed, epoch):
        return global_batches(lengths, 8, 2, 2, seed=seed, epoch=epoch)

    assert order(1, 0) == order(1, 0)
    assert len({json.dumps(order(seed, epoch)) for seed, epoch in [(1, 0), (1, 1), (2, 0), (0, 1), (0, 2)]}) == 5


def test_uneven_settings_are_refused():
    with pytest.raises(InputError, match="not a multiple"):
        GlobalBatchSampler([1, 2], 64, 7, 0, 1, 0)
    with pytest.raises(InputError, match="3 ranks cannot share the 8 micro-batches"):
        GlobalBatchSampler([1, 2], 64, 8, 0, 3, 0)


def test_measurement_indices():
    assert measurement_indices(10, 0.5) == [0, 2, 4, 6, 9]
    assert measurement_indices(5, 0.2) == [0]
    assert measurement_indices(7, 1) == list(range(7))
    twenty_percent = measurement_indices(40_000, 0.2)
    assert len(twenty_percent) == 8000
    assert twenty_percent == [i * 39_999 // 7_999 for i in range(8000)]
    for count, ratio in ((4, 0.2), (10, 0), (10, 1.5), (0, 0.5)):
        with pytest.raises(InputError):
            measurement_indices(count, ratio)
