"""Whatever goes wrong is one line with a status; what comes from data cannot command the terminal."""

import errno
import gzip
import io
import json
import lzma
import os
import resource
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer

from laser_fast.cli import main
from laser_fast.config import PromptConfig
from laser_fast.data import ItemTable
from laser_fast.nn.text_residual import TextResidual
from laser_fast.retrieval.requests import Recommendation, pack_histories

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]
Act, Run = Callable[[], object], Callable[..., int]


@pytest.fixture
def run(monkeypatch: Patch) -> Run:
    """The status of a command that does what is given."""

    def as_command(act: Act, *arguments: str) -> int:
        monkeypatch.setattr("laser_fast.cli.doctor.run", lambda parsed: act() and 0)
        return main([*arguments, "doctor"])

    return as_command


def raising(error: BaseException) -> Act:
    def act() -> object:
        raise error

    return act


def system(number: int, name: str | None = "a/file") -> Act:
    return raising(OSError(number, os.strerror(number), name))


def save_beyond_a_bound() -> None:
    """safetensors tells the system's error in words of its own, as it does of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            save_file({"x": torch.zeros(4096)}, Path(folder) / "x.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (system(errno.ENOSPC), "a/file: the disk must have room, got No space left on device; free some or choose"),
        (system(errno.EROFS), "a/file: the file system must be writable, got Read-only file system"),
        (system(errno.EACCES), "a/file: it must be permitted to read or write it, got Permission denied"),
        (system(errno.EMFILE), "a/file: fewer files must be open at once, got Too many open files; raise `ulimit -n`"),
        (system(errno.EFBIG), "a/file: a file must not grow beyond what the system allows, got File too large; raise"),
        (save_beyond_a_bound, "a file or stream: a file must not grow beyond what the system allows, got File too "),
        (system(errno.EIO, None), "a file or stream: the disk must be whole, got Input/output error"),
        (system(errno.ESTALE), "a/file: the system must be able to do it, got Stale file handle"),
        (system(errno.EPIPE, None), "a file or stream: the system must be able to do it, got Broken pipe"),
        (lambda: b"\xff".decode(), "a text must be UTF-8, got UnicodeDecodeError: 'utf-8' codec can't decode"),
        (lambda: json.loads("[" * 10**5), "a file must not be nested that deep, got RecursionError: maximum recursion"),
        (lambda: zlib.decompress(b"x"), "a packed file must be whole, got Error -5 while decompressing data"),
        (lambda: lzma.decompress(b"x"), "a packed file must be whole, got Input format not supported"),
        (lambda: gzip.decompress(gzip.compress(b"x" * 99)[:-9]), "a file must be whole, got EOFError: Compressed file"),
        (lambda: load(b"\x08\0\0\0\0\0\0\0{}"), "a safetensors file must be whole, got Error while deserializing"),
        (raising(MemoryError()), "memory must hold what is asked for, got MemoryError"),
        (lambda: torch.empty(2**50), "memory must hold what is asked for, got [enforce fail at"),
        (raising(RuntimeError("CUDA error: out of memory")), "memory must hold what is asked for, got CUDA error: out"),
        (raising(torch.OutOfMemoryError("CUDA out of\nmemory")), "memory must hold what is asked for, got CUDA out of"),
        (lambda: np.full(1, 10**30, dtype=np.int64), "a number must not be that large, got OverflowError"),
        (lambda: PromptConfig(max_items=0), "configuration: max_items: Input should be greater than or equal to 1"),
        (lambda: pack_histories(["i1"], {}), "recommend: a history must be a list of item ids, got a str: 'i1'"),
        (lambda: TextResidual(2, 2).fetch_vectors(), "TextResidual: the vectors must be set, got none; call"),
        (lambda: Tokenizer.from_str("{"), "a tokenizer must be whole, got EOF while parsing"),
        (lambda: int("x"), "ValueError: invalid literal for int() with base 10: 'x'"),
    ],
)  # fmt: skip
def test_what_a_person_can_cause_is_one_line(act: Act, message: str, run: Run, capsys: Printed) -> None:
    assert run(act) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"laser-fast: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "TMP"], "TMP: it must be a file, not a folder, got Is a directory"),
        (["train", "TMP/" + "n" * 300], "its name must be shorter, got File name too long"),
        (["train", "TMP/file/config.yaml"], "what stands before the last / must be a folder, got Not a directory"),
        (["train", "TMP/loop"], "its links must lead somewhere, got Too many levels of symbolic links"),
        (["train", "TMP/nowhere"], "TMP/nowhere: it must exist, got No such file or directory"),
        (["train", "TMP/file"], "got one: found unexpected end of stream at line 2, column 5"),
        (["train", "TMP/\x1b[2J"], r"TMP/\x1b[2J: it must exist"),
        (["train"], "the following arguments are required: config; see `laser-fast train --help`"),
        (["train", "x", "--\x1b[2J"], r"unrecognized arguments: --\x1b[2J; see `laser-fast --help`"),
        (["nothing"], "argument COMMAND: invalid choice: 'nothing'"),
        (["recommend", "x", "--sample", "1" + "0" * 12], "--sample: must be a whole number from 1 to 1000000, got '10"),
        (["evaluate", "x", "--draws", "0"], "--draws: must be a whole number from 1 to 1000000, got '0'"),
        (["evaluate", "x", "--bootstrap", "9" * 5000], "--bootstrap: must be a whole number from 1 to 1000000"),
        (["evaluate", "x", "--seed", "-1"], "--seed: must be a whole number from 0 to 4294967295, got '-1'"),
        (["prepare", "x", "--recbole", "y", "--max-archive-gb", "inf"], "must be a number from 0 to 1e+09, got 'inf'"),
        (["prepare", "x", "--recbole", "y", "--min-rating", "nan"], "must be a number from -1e+300 to 1e+300, got"),
    ],
)  # fmt: skip
def test_real_causes(arguments: list[str], message: str, tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "file").write_text('a: 1\nb: "')
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main([argument.replace("TMP", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("laser-fast: error: ") and message.replace("TMP", str(tmp_path)) in error
    assert error.count("\n") == 1 and len(error) < 2100 and "\x1b" not in error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "3", "null", "[]", "[" * 10**5, "\ud800"])
def test_a_language_model_of_damaged_files(
    name: str, content: str, tiny_lm: Path, tmp_path: Path, run: Run, capsys: Printed
) -> None:
    from laser_fast.config import LanguageModelConfig
    from laser_fast.lm.loading.language_model import load_language_model

    for file in tiny_lm.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert run(lambda: load_language_model(LanguageModelConfig(path=str(tmp_path)))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("laser-fast: error: ")


def test_a_fault_of_the_program_is_told_as_one(run: Run, capsys: Printed) -> None:
    for error in (KeyError("lm"), TypeError("f: x must be y, got z"), RuntimeError("odd"), AssertionError()):
        assert run(raising(error)) == 1
        told = capsys.readouterr().err
        expected = f"laser-fast: error: a fault of laser_fast or of a package it needs, {type(error).__name__}"
        assert told.startswith(expected)
        assert "`laser-fast --traceback ...` shows where" in told and told.count("\n") == 1


def test_the_traceback_is_shown_when_asked_for(run: Run, capsys: Printed) -> None:
    assert run(raising(ValueError("a: b must be c, got \x1b")), "--traceback") == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):\n") and "in raising" not in told
    assert ", in act\n" in told and told.endswith("laser-fast: error: ValueError: a: b must be c, got \\x1b\n")


def test_a_message_is_cut(run: Run, capsys: Printed) -> None:
    assert run(raising(ValueError(f"f: x must be y, got {'z' * 10**6}; do this"))) == 2
    told = capsys.readouterr().err
    assert len(told) < 2100 and "f: x must be y, got zzz" in told and told.endswith("zzz; do this\n")


def test_ctrl_c_is_one_line(run: Run, capsys: Printed) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "laser-fast: stopped by SIGINT\n"


def test_a_reader_that_has_gone_is_no_error(run: Run, monkeypatch: Patch, capsys: Printed) -> None:
    for text in ("a line", "many lines\n" * 10**5):  # found at the end, and in the midst
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert run(lambda text=text: print(text)) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full here")
def test_a_full_disk_behind_stdout(run: Run, monkeypatch: Patch, capsys: Printed) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(lambda: print("a line")) == 2
    told = capsys.readouterr().err
    assert told.startswith("laser-fast: error: standard output: the disk must have room, got No space left on device")


def test_streams_that_are_closed(run: Run, monkeypatch: Patch, capsys: Printed) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run(lambda: print("nobody reads it")) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert run(raising(ValueError("x"))) == 2


def test_an_encoding_that_cannot_hold_a_title(run: Run, monkeypatch: Patch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(lambda: print("Amélie \ud800")) == 0
    assert written.getvalue() == b"Am\\xe9lie \\ud800\n"


def test_what_is_printed_commands_no_terminal(run: Run, capsys: Printed) -> None:
    def act() -> None:
        print("a\x1b]0;title\x07\x9b2J\u202eb\n\tc")
        warnings.warn("w\x1b[2J\n" + "x" * 10**5, stacklevel=1)

    assert run(act) == 0
    out, err = capsys.readouterr()
    assert out == "a\\x1b]0;title\\x07\\x9b2J\\u202eb\n\tc\n"
    assert err.startswith("laser-fast: warning: w\\x1b[2J xxx") and err.count("\n") == 1 and len(err) < 2100


@pytest.fixture
def evil_model(monkeypatch: Patch) -> None:
    """A model whose ids and titles come from nobody's friend."""
    items = ItemTable(["a\n9. forged", "b\x1b[2J"], {"title": ["\x1b[31mred \u202e", "long " * 10**5]})
    prompt = SimpleNamespace(item_template="{title}")
    origin = SimpleNamespace(items=items, config=SimpleNamespace(prompt=prompt))
    model: Any = SimpleNamespace(item_ids=items.ids)
    model.recommend = lambda histories, k, exclude_seen: [[Recommendation(item, 0.5) for item in items.ids]]
    monkeypatch.setattr("laser_fast.cli.recommend._load_alone", lambda parsed: model)
    monkeypatch.setattr("laser_fast.laser.laser_files.origin_of", lambda model: origin)


def test_recommend_shows_any_title_on_its_line(evil_model: None, capsys: Printed) -> None:
    assert main(["recommend", "x", "--history", "a\n9. forged", "no\nitem"]) == 0
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\u202e"} and len(out) < 2000
    ranks = [line.strip()[:2] for line in out.splitlines() if line.startswith("    ") and "." in line[:8]]
    assert ranks == ["1.", "2."]
    assert r"\x1b[31mred \u202e" in out and r"no\nitem" in out


def test_json_is_ascii_and_reads_back(evil_model: None, capsys: Printed) -> None:
    assert main(["recommend", "x", "--history", "a", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    answer = json.loads(out)["recommendations"]
    assert (answer[0]["item"], answer[0]["text"]) == ("a\n9. forged", "\x1b[31mred \u202e")
