"""What README shows must work: its stand-alone code runs, its commands parse, its make targets and links exist."""

import re
import shlex
from pathlib import Path

import pytest

from laser_fast.cli import parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_stand_alone_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "load_laser" not in block]
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([3, 2])" in capsys.readouterr().out


def test_commands_parse() -> None:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.startswith("laser-fast ")]
    assert {command[0] for command in commands} >= {
        "prepare",
        "recommender",
        "train",
        "evaluate",
        "compare",
        "recommend",
    }
    for command in commands:
        assert callable(parser().parse_args(command).run)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"^make ([a-z]+)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert target in targets


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
