"""A run directory, read and written."""
