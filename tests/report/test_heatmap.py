"""The accuracy matrix as an HTML table."""

import re

from report_runs import BASE, MATRIX, TASKS

from llava_cl.report.heatmap import accuracy_table


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>.*?</td>", row) for row in re.findall(r"<tr.*?</tr>", html)][1:]


def test_cells_colours_and_changes() -> None:
    rows = rows_of(accuracy_table(TASKS, MATRIX, BASE, dict.fromkeys(TASKS, 25.0)))
    assert len(rows) == 1 + 6 + 1
    assert rows[0][1] == f'<td style="--a:{53.73 / 93.8:.3f}">53.7</td>'
    for stage in range(6):
        for task, cell in enumerate(rows[stage + 1][:6]):
            assert ('class="now"' in cell) == (stage == task)
            assert ('class="unseen"' in cell) == (task > stage)
            assert ("<small" in cell) == (task < stage)
    assert "<small>−0.5</small>" in rows[2][0]  # 90.53 - 91.07
    assert '<small class="loss">−1.9</small>' in rows[6][0]  # 89.13 - 91.07
    assert rows[2][6] == '<td class="mean">92.2</td>'  # mean of 90.53 and 93.8
    assert rows[7][:6] == ["<td>25.0</td>"] * 6


def test_stages_to_come_are_empty_and_unknown_cells_are_dashes() -> None:
    rows = rows_of(accuracy_table(["a", "b", "c"], [[50.0, None, 10.0]]))
    assert rows[0][1] == '<td class="unseen">–</td>'
    assert rows[1] == ["<td></td>", '<td class="now"></td>', '<td class="unseen"></td>', '<td class="mean"></td>']
    assert len(rows) == 3


def test_no_value_at_all_is_still_a_table() -> None:
    assert len(rows_of(accuracy_table(["a"], []))) == 1
    assert '"--a:0.000">0.0<' in accuracy_table(["a"], [[0.0]])
