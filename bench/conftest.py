"""How every benchmark measures: candidate and baselines in turn, against a device copy of the same run."""

import ctypes
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(
    str(Path(__file__).parent)
)  # so that the files beside can be imported; the library stays the installed one

from forms import (
    Compare,
    CompareForms,
    CompileForms,
    Form,
    assert_agreement,
    compile_forms,
    fresh_leaves,
    one_pass,
    skip_unless_on,
)
from peak_memory import peak_of
from reporting.reasons import without_paths
from roofline import measure_copy
from timing import Captured, Clock, Run, clock_of, idle_clock, interleaved_medians
from workloads import Case

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_BUDGET_S, _QUICK_S = 1.0, 0.3  # of measuring one operation, for all forms together
_STEP_BUDGET_S = {"cpu": 4.0, "cuda": 3.0}  # of measuring, for all forms together
_NO_COMPILATION = "compiled forms are timed on a GPU only, and not with --quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    """For runs whose minutes are counted."""
    words = "nothing compiled, nothing that a CUDA graph cannot hold, and a third of the time for each"
    parser.addoption("--quick", action="store_true", help=words)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Benchmarks are named after their operation, bench_x.py, and are no part of the test suite."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):  # named ones pytest takes itself
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """A file that can be published: how it was made, and nothing about whose machine it was."""
    machine, commit = output_json["machine_info"], output_json["commit_info"]
    cpu = {key: machine["cpu"].get(key) for key in ("brand_raw", "count", "arch")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pytest-benchmark")}
    output_json["machine_info"] = {"system": machine["system"], "machine": machine["machine"], "cpu": cpu}
    output_json["machine_info"]["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    output_json["commit_info"] = {key: commit.get(key) for key in ("id", "time", "dirty")}
    output_json["versions"] = {"python": platform.python_version(), **versions}
    output_json["command"] = without_paths(" ".join(["pytest", *map(str, config.invocation_params.args)]))
    output_json["threads"] = torch.get_num_threads()
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark.pop("params")  # `param` names them


@pytest.fixture(scope="session", autouse=True)
def _recycled_memory() -> None:
    """Freed memory stays with the process, as it does on a GPU; otherwise glibc hands blocks over 32 MB back.

    A result of 75 MB (dispatch at the authors' size) would cost 18,000 page faults, 50 ms on the machine of
    bench/results/cpu, unless the form that ran before happened to leave a hole of that size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy too large for any cache, measured here and now."""
    return measure_copy(device, 2**28 if device.type == "cuda" else 2**24, idle_clock(device), budget_s=0.1)


def _record(benchmark: Any, device: torch.device, seconds: dict[str, float], **facts: object) -> dict[str, float]:
    """Put the facts and the speed-ups over the baselines into `extra_info`; the speed-ups, not rounded."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    speedups = {key: value / seconds["candidate"] for key, value in seconds.items() if key != "candidate"}
    rounded = {f"speedup_over_{key}": round(speedup, 3) for key, speedup in speedups.items()}
    benchmark.extra_info.update(rounded, **facts, device=name)
    return speedups


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the minutes are counted."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def compare(benchmark: Any, device: torch.device, copy_gb_per_s: float, quick: bool) -> Compare:
    """Time a candidate against named baselines; the figures go into `benchmark.extra_info`, the speedups come back."""

    def run(
        candidate: Run, baselines: Mapping[str, Run], *, moved_bytes: int, clock: Clock | None = None, **facts: object
    ) -> dict[str, float]:
        clock = clock or idle_clock(device)
        seconds = interleaved_medians({"candidate": candidate, **baselines}, clock, _QUICK_S if quick else _BUDGET_S)
        bandwidth = moved_bytes / seconds["candidate"] / 1e9
        speedups = _record(
            benchmark,
            device,
            seconds,
            **facts,
            median_us={name: round(1e6 * value, 1) for name, value in seconds.items()},
            moved_bytes=moved_bytes,
            bandwidth_gb_per_s=round(bandwidth, 2),
            copy_gb_per_s=round(copy_gb_per_s, 2),
            roofline_fraction=round(bandwidth / copy_gb_per_s, 3),
        )
        if device.type == "cuda" and facts.get("mode", "plain") == "plain":  # a graph allocates nothing when replayed
            benchmark.extra_info["peak_memory_bytes"] = peak_of(candidate, device).step
        benchmark.pedantic(lambda: idle_clock(device)(candidate), rounds=5, warmup_rounds=1)
        return speedups

    return run


@pytest.fixture
def compare_steps(benchmark: Any, device: torch.device, quick: bool) -> Compare:
    """Time whole steps of a model, too long to repeat often, against named baselines, as `compare` does."""

    def run(
        candidate: Run, baselines: Mapping[str, Run], *, tokens: Mapping[str, tuple[int, int]], **facts: object
    ) -> dict[str, float]:
        """`tokens` of "candidate" and every baseline: the useful ones, and those that run through the model."""
        runs = {"candidate": candidate, **baselines}
        budget_s = _QUICK_S if quick else _STEP_BUDGET_S[device.type]
        seconds = interleaved_medians(runs, idle_clock(device), budget_s, least_rounds=2)
        speedups = _record(
            benchmark,
            device,
            seconds,
            **facts,
            median_ms={name: round(1e3 * value, 2) for name, value in seconds.items()},
            useful_tokens=tokens["candidate"][0],
            tokens={name: computed for name, (_, computed) in tokens.items()},
            padding_ratio={name: round(computed / useful, 3) for name, (useful, computed) in tokens.items()},
            tokens_per_s={name: round(tokens[name][0] / value, 1) for name, value in seconds.items()},
        )
        if device.type == "cuda":
            benchmark.extra_info["peak_memory_bytes"] = {
                name: peak_of(form, device).step for name, form in runs.items()
            }
        benchmark.pedantic(candidate, rounds=1)
        return speedups

    return run


@pytest.fixture
def compare_forms(compare: Compare, device: torch.device, quick: bool) -> CompareForms:
    """Time one pass of forms of an operation in the mode of a case, after all of them have proven equal."""

    def run(case: Case, name: str, candidate: Form, baselines: Mapping[str, Form], **facts: Any) -> dict[str, float]:
        if quick and case.mode != "plain":
            baselines = {key: form for key, form in baselines.items() if form.captured}
        assert_agreement(candidate, baselines)
        left_out = {"compiled": _NO_COMPILATION} if device.type == "cpu" or quick else {}
        runs = {}
        for key, form in {"candidate": candidate, **baselines}.items():
            if case.mode == "plain":
                runs[key] = one_pass(name, form.function, form.inputs)
            elif form.captured:
                runs[key] = Captured(lambda form=form: one_pass(name, form.function, fresh_leaves(form.inputs)))
            else:
                left_out[key] = "reads back to the host, which no CUDA graph can hold"
        return compare(
            runs.pop("candidate"),
            runs,
            clock=clock_of(case.mode, device),
            mode=case.mode,
            left_out=left_out,
            shape={**case.workload._asdict(), "dtype": str(case.workload.dtype)},
            **facts,
        )

    return run


@pytest.fixture
def compiled(device: torch.device, quick: bool) -> CompileForms:
    """Adds the compiled form of every form, on a GPU."""
    return lambda forms: forms if device.type == "cpu" or quick else forms | compile_forms(forms)


@pytest.fixture
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    """The case a benchmark is parametrised with (indirectly), skipped where its device is not there."""
    skip_unless_on(request.param.workload.device, device)
    return request.param
