"""What a run leaves behind and what its user sees: run folder, checkpoints, metrics, live view, report.

``README.md`` beside this file describes the files of a run. torch, rich and jinja2 are imported on first use.
"""

from fednano.runs.checkpoints import Checkpoint
from fednano.runs.folder import RunFolder
from fednano.runs.plain import PlainView, QuietView
from fednano.runs.progress import PLANES, RunInfo, RunView, make_view
from fednano.runs.report import render_report
from fednano.runs.summary import Phase, Summary

__all__ = [
    "PLANES",
    "Checkpoint",
    "Phase",
    "PlainView",
    "QuietView",
    "RunFolder",
    "RunInfo",
    "RunView",
    "Summary",
    "make_view",
    "render_report",
]
