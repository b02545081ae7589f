"""The report of a run: one self-contained page, figures, a comparison of runs, and tables for the console."""

from llava_cl.report.compare import compare_runs
from llava_cl.report.console import console_table, summary_table
from llava_cl.report.export import export_run
from llava_cl.report.load import RunRecord, load_run
from llava_cl.report.page import write_report
from llava_cl.report.schema import Metrics

__all__ = [
    "Metrics",
    "RunRecord",
    "compare_runs",
    "console_table",
    "export_run",
    "load_run",
    "summary_table",
    "write_report",
]
