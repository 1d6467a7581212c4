"""Run records, the comparison table, and the HTML reports of runs and of requests to forget (extra ``report``)."""

from lightning_cl.metrics.record import RunRecord, Trace, WithinTask, read_records, write_record
from lightning_cl.report.html import write_report
from lightning_cl.report.requests import request_matrix, write_request_report
from lightning_cl.report.table import MethodRow, Statistic, format_markdown, format_table, print_table, summarise

__all__ = [
    "MethodRow",
    "RunRecord",
    "Statistic",
    "Trace",
    "WithinTask",
    "format_markdown",
    "format_table",
    "print_table",
    "read_records",
    "request_matrix",
    "summarise",
    "write_record",
    "write_report",
    "write_request_report",
]
