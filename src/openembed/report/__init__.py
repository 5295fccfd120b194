"""The report of a run: plain results in, one self-contained HTML file out."""

from openembed.report.mining import write_audit
from openembed.report.page import (
    Cleaning,
    Hit,
    Removal,
    Report,
    Score,
    Search,
    TaskScores,
    TrainingRun,
    render,
    verdicts,
    write_report,
)
from openembed.report.tradeoff import Cost

__all__ = [
    "Cleaning",
    "Cost",
    "Hit",
    "Removal",
    "Report",
    "Score",
    "Search",
    "TaskScores",
    "TrainingRun",
    "render",
    "verdicts",
    "write_audit",
    "write_report",
]
