"""Input files that are mutated at random, given to the command line: a result that can be read, or one line of refusal.

Lost is: an error of another kind, a process that dies or takes long, a result that cannot be read, and anything that a
refused command leaves behind.
"""

import gzip
import io
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attacking.attack import Scope
from attacking.children import Ended, Findings, Trial, run

TITLE = "inputs"
_BATCH = 25  # mutants a trial
_FILE_S = 20.0  # for one mutant; a right one takes a tenth of a second
_USERS, _ITEMS = 6, 8
_TOKENS = (
    *(b'"', b"'", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\t", b"::", b",,,,", b"|", b"\xe2\x80\xa8"),
    *(b"1e400", b"nan", b"-1", b"9" * 40, b"9" * 5000, b"0x1f", b"1_000", b"None", b"2017-13-45", b"\xed\xa0\x80"),
    *(b"[" * 3000, b'{"a": {"b": [', b"}", b"]", b"true", b"x" * 140_000),
    *(b"&a [*a]", b"!!python/object/apply:os.getcwd []", b"<<: *x", b"- - -", b"? ", b"!!binary x", b"~", b": "),
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]\n",
)

Files = dict[str, bytes]
Rows = list[list[object]]


@dataclass(frozen=True)
class Kind:
    """A form of input.

    Attributes:
        files: right ones, by name.
        words: the command, run where the files are.
        times: how often it is mutated.
        packed: names of those that are compressed, half of which are mutated before they are.
        writes: whether the command writes the folder `out` if nothing is wrong; else it is always refused.
    """

    name: str
    files: Files
    words: list[str | Path]
    times: int
    packed: tuple[str, ...] = ()
    writes: bool = True


def attack(scope: Scope) -> None:
    """A line for every form of input."""
    scope.divide(len(kinds := list(_kinds(scope))))
    for kind in kinds:
        what = f"a mutated log or item file: {kind.name}" if kind.writes else f"a mutated {kind.name}"
        scope.try_all(kind.name, what, _trials(scope, kind))


def _kinds(scope: Scope) -> Iterator[Kind]:
    rows: Rows = [
        [f"u{user}", f"i{(user + step) % _ITEMS}", 5 - step, 100 * user + step]
        for user in range(_USERS)
        for step in range(5)
    ]
    names = ["user_id", "item_id", "rating", "timestamp"]
    items = [[f"i{item}", f'Title {item}, the "best"', "tool; caf\u00e9"] for item in range(_ITEMS)]
    item_names = ["item_id", "title", "genres"]
    in_quotes: Rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in items]
    log, quoted = _lines(rows, names, ","), _lines(in_quotes, item_names, ",")

    def tables(log_name: str, items_name: str) -> list[str | Path]:
        return ["prepare", "out", "--interactions", log_name, "--items", items_name]

    yield Kind("CSV", {"log.csv": log, "items.csv": quoted}, tables("log.csv", "items.csv"), 800)
    json_lines = {"log.jsonl": _objects(rows, names), "items.jsonl": _objects(items, item_names)}
    yield Kind("JSON lines", json_lines, tables("log.jsonl", "items.jsonl"), 600)
    zipped = {"log.csv.gz": log, "items.csv.gz": quoted}
    yield Kind("gzip", zipped, tables("log.csv.gz", "items.csv.gz"), 300, tuple(zipped))
    parquet = {"log.parquet": _parquet(rows, names), "items.parquet": _parquet(items, item_names)}
    yield Kind("Parquet", parquet, tables("log.parquet", "items.parquet"), 300)
    tokens = (
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
        ["item_id:token", "title:token_seq", "genres:token_seq"],
    )
    atomic = {"x/x.inter": _lines(rows, tokens[0], "\t"), "x/x.item": _lines(items, tokens[1], "\t")}
    yield Kind("RecBole", atomic, ["prepare", "out", "--recbole", "x"], 400)
    training = {"c.yaml": scope.world.configuration.read_bytes()}
    # without a run to go on with it is refused after the configuration was read, and before anything is loaded
    yield Kind("configuration of `train`", training, ["train", "c.yaml", "--resume"], 600, writes=False)
    recommender = {"c.yaml": b"kind: sasrec\nwidth: 8\nnum_layers: 1\nmax_length: 8\nepochs: 1\nfolds: 2\n"}
    words = ["recommender", "train", scope.world.data, scope.world.recommender(), "--config", "c.yaml"]
    yield Kind("configuration of `recommender train`", recommender, words, 200, writes=False)


def _trials(scope: Scope, kind: Kind) -> Iterator[Trial]:
    for start in range(0, total := scope.times(kind.times), _BATCH):
        numbers = range(start, min(start + _BATCH, total))
        yield lambda findings, numbers=numbers: _try(findings, scope, kind, numbers)


def _try(findings: Findings, scope: Scope, kind: Kind, numbers: range) -> None:
    for number in numbers:
        drawn = scope.random(TITLE, kind.name, number)
        folder = scope.place(kind.name.replace("`", "").replace(" ", "-"), number)
        for name, content in _mutated(drawn, kind).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        end = run(kind.words, folder, _FILE_S)
        outcome, fault = _judged(end, folder, kind)
        findings.saw(outcome)
        if fault:
            findings.lose(f"{kind.name}, mutant {number}: {fault}")
        shutil.rmtree(folder)


def _judged(end: Ended, folder: Path, kind: Kind) -> tuple[str, str]:
    """How it ended, and what is wrong with that."""
    from laser_fast.data import SequenceDataset

    if end.late or end.status < 0:
        return "died", end.told()
    if end.status == 0 and kind.writes:
        try:
            SequenceDataset.load(folder / "out")
        except Exception as error:
            return "unreadable", f"the result: {type(error).__name__}: {str(error)[:200]}"
        return "prepared", ""
    if end.refusal() is None:
        return "failed", end.told()
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "out")
    return "refused", f"refused, and left {', '.join(left)}" if left else ""


def _mutated(drawn: random.Random, kind: Kind) -> Files:
    """The files with one of them changed in one to three places."""
    files = dict(kind.files)
    name = drawn.choice(sorted(files))
    unpacked = name in kind.packed and drawn.random() < 0.5
    if unpacked:
        files[name] = _changed(drawn, files[name])
    files = {other: gzip.compress(content) if other in kind.packed else content for other, content in files.items()}
    if not unpacked:
        files[name] = _changed(drawn, files[name])
    return files


def _changed(drawn: random.Random, content: bytes) -> bytes:
    for _ in range(drawn.choice((1, 1, 2, 3))):
        content = drawn.choice(_CHANGES)(drawn, content or b"x")
    return content


def _flip(drawn: random.Random, content: bytes) -> bytes:
    at = drawn.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << drawn.randrange(8)]) + content[at + 1 :]


def _cut(drawn: random.Random, content: bytes) -> bytes:
    return content[: drawn.randrange(len(content))]


def _delete(drawn: random.Random, content: bytes) -> bytes:
    at = drawn.randrange(len(content))
    return content[:at] + content[at + drawn.randint(1, 30) :]


def _repeat(drawn: random.Random, content: bytes) -> bytes:
    at, length = drawn.randrange(len(content)), drawn.randint(1, 60)
    return content[: at + length] + content[at:]


def _insert(drawn: random.Random, content: bytes) -> bytes:
    at = drawn.randrange(len(content) + 1)
    return content[:at] + drawn.choice(_TOKENS) + content[at:]


def _replace_cell(drawn: random.Random, content: bytes) -> bytes:
    """What stands between two separators becomes something else."""
    at = drawn.randrange(len(content))
    begin = 1 + max(content.rfind(mark, 0, at) for mark in (b",", b"\t", b"\n", b":"))
    ends = [end for mark in (b",", b"\t", b"\n") if (end := content.find(mark, at)) >= 0]
    return content[:begin] + drawn.choice(_TOKENS) + content[min(ends, default=len(content)) :]


def _swap_lines(drawn: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    one, two = drawn.randrange(len(lines)), drawn.randrange(len(lines))
    lines[one], lines[two] = lines[two], lines[one]
    return b"\n".join(lines)


_CHANGES = (_flip, _cut, _delete, _repeat, _insert, _insert, _replace_cell, _replace_cell, _swap_lines)


def _lines(rows: Rows, names: list[str], separator: str) -> bytes:
    return "".join(separator.join(map(str, row)) + "\n" for row in [names, *rows]).encode()


def _objects(rows: Rows, names: list[str]) -> bytes:
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode()


def _parquet(rows: Rows, names: list[str]) -> bytes:
    stream = io.BytesIO()
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), stream)
    return stream.getvalue()
