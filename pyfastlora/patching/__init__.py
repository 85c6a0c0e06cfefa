"""Puts the fused regions into PEFT models, takes them out again, and says what runs where."""

from pyfastlora.patching.apply import patch, report, unpatch
from pyfastlora.patching.report import PatchReport, Row

__all__ = ["PatchReport", "Row", "patch", "report", "unpatch"]
