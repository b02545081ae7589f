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
