"""Saving a model in forms that are read without Esper."""

from esper.kasmina.export.exporter import FORMS, export_model
from esper.kasmina.export.report import ExportReport
from esper.kasmina.export.sample import Sample

__all__ = ["FORMS", "ExportReport", "Sample", "export_model"]
