"""Benchmarks of bench/ as lines of an item."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpu.work import Found, Prediction, Work, against_strongest


class Benchmark(NamedTuple):
    """One of them.

    Attributes:
        test: file and function, from bench/.
        on_gpu: its case.
        on_cpu: the case of the rehearsal; empty = none, and the line says what pytest says.
        operation: of `laser_fast.ops`, whose backend the line names.
    """

    test: str
    on_gpu: str
    on_cpu: str = ""
    prediction: Prediction | None = None
    operation: str | None = None


def names_of(table: dict[str, Benchmark], rehearse: bool) -> list[str]:
    """The names of its lines; in a rehearsal the first of every function."""
    if not rehearse:
        return list(table)
    first = {benchmark.test: name for name, benchmark in reversed(table.items())}
    return [name for name in table if name in first.values()]


def run_benchmarks(work: Work, table: Mapping[str, Benchmark], *, options: Sequence[str] = ()) -> None:
    """Make the wanted lines of the table, in its order, in one call of pytest with these options."""
    names = [name for name in table if name in work.wanted]
    if not names:
        return
    from reporting.kernels import row_of

    from gpu.testing import Outcome, run_tests

    roofs, ids, backends = work.context.roofs, {}, _backends()
    for name in names:
        benchmark = table[name]
        case = (work.rehearse and benchmark.on_cpu) or benchmark.on_gpu
        ids[f"bench/{benchmark.test}[{case}]"] = name

    def summary(outcomes: list[Outcome]) -> Found:
        (outcome,) = outcomes
        benchmark, info = table[ids[outcome.test]], outcome.extra
        row = row_of({"fullname": outcome.test, "extra_info": info}, roofs)
        found = Found(row["us"], "us", prediction=benchmark.prediction, backend=backends.get(benchmark.operation or ""))
        if "share_of_limit" in row:
            found.share_of_limit, found.limit = row["share_of_limit"], row["limit"]
        kept = ("median_us", "median_ms", "peak_memory_bytes", "left_out")
        found.more = {key: info[key] for key in kept if key in info}
        return against_strongest(found, row["speedups"])

    files = {name: f"bench/{table[name].test.partition('::')[0]}" for name in names}
    words = ["--benchmark-only", "--benchmark-disable-gc", *options]
    run_tests(work, files, ids.get, summary, options=words, attention="fast")


def _backends() -> dict[str, str]:
    """What runs an operation here, by its name."""
    from laser_fast.doctor import diagnose

    return {part.name.removeprefix("op "): part.version for part in diagnose() if part.name.startswith("op ")}
