"""The table of seconds and memory."""

import re

from report_runs import stage_cost

from llava_cl.report.schema import StageCost
from llava_cl.report.tables import cost_table


def test_steps_in_their_order_and_bars_on_one_scale() -> None:
    first = stage_cost(1, "a")
    first["seconds"] = {"train": 50.0, "zip": 1.0, "load": 25.0}
    second = stage_cost(2, "b")
    second["seconds"] = {"train": 100.0}
    second["peak_memory_bytes"] = first["peak_memory_bytes"] // 2
    html = cost_table([StageCost.model_validate(first), StageCost.model_validate(second)])
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert heads == ["stage", "load", "train", "zip", "total", "peak memory"]
    assert re.findall(r'style="width:([\d.]+)%', html) == ["25.0", "50.0", "1.0", "100.0", "100.0", "50.0"]
    assert "1 m 16 s" in html  # 25 + 50 + 1


def test_memory_of_steps_and_rates_of_training() -> None:
    first, second = stage_cost(0, "base"), stage_cost(1, "a")
    first["seconds"], second["seconds"] = {"load": 1.0, "protect": 2.0}, {"load": 1.0, "train": 50.0}
    first["step_memory_bytes"] = {"protect": 300 * 2**20}
    second["step_memory_bytes"] = {"load": 2**30, "train": 71 * 2**30}
    second["training"] = {"samples_per_second": 12.34, "tokens_per_second": 8123.4}
    html = cost_table([StageCost.model_validate(first), StageCost.model_validate(second)])
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert heads == ["stage", "load", "train", "protect", "total", "peak memory", "samples/s", "tokens/s"]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in html.split("<tr>")[2:]]
    assert [[re.sub("<.*?>", " ", cell).split() for cell in row[:3]] for row in rows] == [
        [["1.0", "s"], ["–"], ["2.0", "s", "300", "MiB"]],
        [["1.0", "s", "1.0", "GiB"], ["50.0", "s", "71.0", "GiB"], ["–"]],
    ]
    assert [row[-2:] for row in rows] == [["–", "–"], ["12.3", "8,123"]]
