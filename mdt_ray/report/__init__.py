"""The report: one self-contained HTML page about a run of all four jobs."""

from mdt_ray.report.page import write

__all__ = ["write"]
