"""The run report: one self-contained page of what happened in a run."""

from esper.nissa.report.page import render, write_report
from esper.nissa.report.story import Story

__all__ = ["Story", "render", "write_report"]
