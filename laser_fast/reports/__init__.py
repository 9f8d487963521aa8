"""The report of a run, in words and pictures: what was trained, how well it does, and what its experts do."""

from laser_fast.reports.report import check_report_folder, write_report
from laser_fast.reports.subject import Subject, read_run

__all__ = ["Subject", "check_report_folder", "read_run", "write_report"]
