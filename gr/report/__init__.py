"""The HTML report of a run: one self-contained file, written from the run folder alone."""

from gr.report.report import write_report

__all__ = ["write_report"]
