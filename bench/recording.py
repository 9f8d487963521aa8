"""What a script of bench/ keeps: its figures, the command that made them, and on what they were made."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from laser_fast.runs.run_directory import describe_environment


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Of a script whose first words say what it does."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def record(out: str | None, facts: dict[str, Any]) -> None:
    """Write a JSON file of the facts, the command and the environment; nothing where no file was asked for."""
    if out is None:
        return
    report = {"command": shlex.join(["python", *sys.argv]), "environment": describe_environment(), **facts}
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
