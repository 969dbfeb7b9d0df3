"""The report as one page."""

from .report import Report


def page(report: Report) -> str:
    return ""
