"""The sections of bench/report.py, one file each, and what they share."""
