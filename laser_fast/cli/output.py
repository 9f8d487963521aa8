"""What the commands print: text of data cannot command the terminal, and every error is one line on stderr.

The exit status is 2 for what a person can mend (a file, a setting, an argument, a full disk, memory), 1 for a fault of
laser_fast itself, and what a shell expects for a signal.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, cast

from pydantic import ValidationError

from laser_fast.config.settings import describe_problems
from laser_fast.printable import one_line, printable

_PROG = "laser-fast"
_OUTPUT = "standard output"
_SYSTEM_ERROR = re.compile(r"\(os error (\d{1,4})\)")
_OUR_MESSAGE = re.compile(r"[^:\n]{1,100}: .*\bgot\b", re.DOTALL)

_RULES = {
    errno.EACCES: "it must be permitted to read or write it",
    errno.EDQUOT: "the disk must have room; free some or choose another place",
    errno.EEXIST: "nothing must be in its place",
    errno.EFBIG: "a file must not grow beyond what the system allows; raise `ulimit -f`, or choose another place",
    errno.EIO: "the disk must be whole",
    errno.EISDIR: "it must be a file, not a folder",
    errno.ELOOP: "its links must lead somewhere",
    errno.EMFILE: "fewer files must be open at once; raise `ulimit -n`",
    errno.ENAMETOOLONG: "its name must be shorter",
    errno.ENOENT: "it must exist",
    errno.ENOSPC: "the disk must have room; free some or choose another place",
    errno.ENOTDIR: "what stands before the last / must be a folder",
    errno.EPERM: "it must be permitted to read or write it",
    errno.EROFS: "the file system must be writable",
}

# what a person can cause, and the rule it breaks; the messages of the last need none
_CAUSES: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((UnicodeError,), "a text must be UTF-8"),
    ((MemoryError,), "memory must hold what is asked for"),
    ((RecursionError,), "a file must not be nested that deep"),
    ((EOFError,), "a file must be whole"),
    ((OverflowError,), "a number must not be that large"),
    ((ValueError, OSError, ImportError, FloatingPointError), ""),
)
# the same for packages that may be missing or are slow to import, by their names
_CAUSES_OF_PACKAGES = (
    ("a safetensors file must be whole", {"safetensors"}),
    ("a packed file must be whole", {"zlib", "_lzma", "lzma"}),
    ("an archive must be whole", {"zipfile", "tarfile"}),
    ("a checkpoint must hold weights alone", {"_pickle", "pickle"}),
    ("a Parquet file must be whole", {"pyarrow"}),
    ("the Hub must answer", {"httpx", "huggingface_hub"}),
)


class Parser(argparse.ArgumentParser):
    """Arguments that are refused raise `UsageError`, so that they are told as every other error is."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` always."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


class UsageError(ValueError):
    """The command line has arguments that the command does not know or take."""


class _Escaped:
    """A stream that writes control characters, and what its encoding cannot hold, as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"  # a stream of a string has none
        shown = printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding)
        with _named_output():
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with _named_output():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _named_output() -> Iterator[None]:
    """Name stdout in errors of the system."""
    try:
        yield
    except OSError as error:
        error.filename = _OUTPUT
        raise


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Escape stdout and print a warning on one line. Bars go to stderr, which is left as it is."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _print_warning
        if sys.stdout is not None:  # closed by who started us
            stack.enter_context(contextlib.redirect_stdout(cast(TextIO, _Escaped(sys.stdout))))
        yield


def report_error(error: BaseException, *, trace: bool) -> int:
    """Print one line about `error` on stderr, after its traceback if that is asked for.

    Returns:
        The exit status: 2; 1 for a fault of laser_fast; 130 for Ctrl-C; 141, and no line, if the reader of stdout left.
    """
    _flush_output()
    if isinstance(error, BrokenPipeError) and error.filename == _OUTPUT:
        return 128 + signal.SIGPIPE
    if trace:
        _say(printable("".join(traceback.format_exception(error)).rstrip(), lines=True))
    if isinstance(error, KeyboardInterrupt):
        _say(f"{_PROG}: stopped by SIGINT")
        return 128 + signal.SIGINT
    if (told := _explain(error)) is not None:
        _say(f"{_PROG}: error: {one_line(told)}")
        return 2
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    see = "" if trace else f"; `{_PROG} --traceback ...` shows where"
    _say(f"{_PROG}: error: a fault of laser_fast or of a package it needs, {one_line(said)}{see}; please report it")
    return 1


def _explain(error: BaseException) -> str | None:
    """What a person did and can mend; None for a fault of the program."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ValidationError):
        return describe_problems(error, "configuration")
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_system(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = [(str(frame.f_globals.get("__name__", "")), frame.f_code.co_name) for frame in frames]
    ours = isinstance(error, UsageError) or (bool(calls) and calls[-1][0].partition(".")[0] == "laser_fast")
    if ours and _OUR_MESSAGE.match(message):
        return message
    if "torch" in sys.modules:  # else nobody can have run out of its memory
        from laser_fast.models.token_budget import is_out_of_memory

        if is_out_of_memory(error):
            return f"memory must hold what is asked for, got {message}"
    for kinds, rule in _CAUSES:
        if isinstance(error, kinds):
            told = message if message and ours else f"{type(error).__name__}: {message}"
            return f"{rule}, got {told}" if rule else told
    if found := _SYSTEM_ERROR.search(message):  # of packages in Rust, which have no kind of their own for it
        return _explain_system(OSError(int(found[1]), os.strerror(int(found[1]))))
    raised_by = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    for rule, packages in _CAUSES_OF_PACKAGES:
        if packages & raised_by:
            return f"{rule}, got {message}"
    if type(error) is Exception:  # `tokenizers` has no kind of its own
        return f"a tokenizer must be whole, got {message}"
    if any(name == "from_pretrained" and module.startswith("transformers.") for module, name in calls):
        # transformers checks little of the folder it reads
        return f"the files of a language model must be whole, got {type(error).__name__}: {message}"
    return None


def _explain_system(error: OSError) -> str:
    """File, rule and the system's words: `runs/a: the disk must have room, got No space left on device`."""
    names = (error.filename, error.filename2)
    what = " -> ".join(os.fsdecode(n) for n in names if isinstance(n, str | bytes | os.PathLike)) or "a file or stream"
    rule, _, remedy = _RULES.get(error.errno or 0, "the system must be able to do it").partition("; ")
    return f"{what}: {rule}, got {error.strerror}" + (f"; {remedy}" if remedy else "")


def _flush_output() -> None:
    """Write what stdout still holds, or throw it away if that fails: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # full or unread; closed; none
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _say(line: str) -> None:
    if sys.stderr is not None:  # `print` would take stdout
        with contextlib.suppress(OSError, ValueError):  # full or unread; closed
            print(line, file=sys.stderr, flush=True)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"{_PROG}: warning: {one_line(str(message))}")
