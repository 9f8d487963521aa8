"""The commands: each file is one command, its arguments and its few lines over the library."""

from laser_fast.cli.commands import main, parser

__all__ = ["main", "parser"]
