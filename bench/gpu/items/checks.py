"""Items 2 and 9: a few cases of every family of kernels against float64, and all tests that need a GPU."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from gpu.work import Found, Work

_TESTS = Path(__file__).resolve().parents[3] / "tests"
_MOST = 4  # cases of a family: each compiles kernels of its own
_AT_ONCE = 4


class Family(NamedTuple):
    """A test that sets a kernel against float64.

    Attributes:
        test: file and function, from tests/.
        on_gpu: part of the ids of the cases that run on a GPU.
        rehearsed: part of the ids of those that run in Triton's interpreter.
    """

    test: str
    on_gpu: str = "bf16"
    rehearsed: str = "fp32"


FAMILIES = {
    "attention": Family("lm/attention/test_flash.py::test_on_a_gpu_against_float64", "bfloat16", "bfloat16"),
    "routing": Family("kernels/test_routing.py::test_as_accurate_as_the_reference"),
    "routing, gradients": Family("kernels/test_routing_backward.py::test_as_accurate_as_autograd"),
    "dispatch, gradients": Family("kernels/test_dispatch.py::test_dispatch_backward"),
    "combine, gradients": Family("kernels/test_dispatch.py::test_combine"),
    "prefix KV": Family("ops/test_prefix_kv_gpu.py::test_copies_and_sums_equal_the_cpu_bit_by_bit", "bfloat16", ""),
    "RMSNorm": Family("kernels/test_rms_norm.py::test_as_accurate_as_autograd"),
    "gated product": Family("kernels/test_gated_product.py::test_as_accurate_as_autograd"),
    "rotation": Family("kernels/test_rotary.py::test_rotation"),
    "4-bit weights": Family("lm/execution/test_execution_gpu.py::test_four_bit_weights_give_the_gradient", "", ""),
    "fused modules": Family("lm/execution/test_execution_gpu.py::test_fused_kernels_err_at_most_twice", "", ""),
}


def names(rehearse: bool) -> list[str]:
    """The families."""
    return list(FAMILIES)


def run(work: Work) -> None:
    """All families in one call of pytest."""
    from gpu.testing import Outcome, run_tests

    def group(test: str) -> str | None:
        for name, family in FAMILIES.items():
            if family.test in test and (family.rehearsed if work.rehearse else family.on_gpu) in test:
                return name
        return None

    def summary(outcomes: list[Outcome]) -> Found:
        return Found(sum(outcome.status == "passed" for outcome in outcomes), "cases within bounds")

    files = {name: f"tests/{family.test.partition('::')[0]}" for name, family in FAMILIES.items()}
    run_tests(work, files, group, summary, most=1 if work.rehearse else _MOST)


def suite_names(rehearse: bool) -> list[str]:
    """Files with tests that need a GPU, from tests/; of a rehearsal, where all of them are skipped, one."""
    files = [file for file in sorted(_TESTS.rglob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    return [file.relative_to(_TESTS).as_posix() for file in (files[:1] if rehearse else files)]


def run_suite(work: Work) -> None:
    """A line for every file; four tests at a time by pytest-xdist where it is installed, else one after the other."""
    from gpu.testing import Outcome, run_tests

    def group(test: str) -> str | None:
        return test.partition("::")[0].removeprefix("tests/")

    def summary(outcomes: list[Outcome]) -> Found:
        skipped = {outcome.test: outcome.reason for outcome in outcomes if outcome.status == "skipped"}
        passed = len(outcomes) - len(skipped)
        return Found(passed, f"of {len(outcomes)} tests pass", more={"skipped": skipped} if skipped else {})

    at_once = 1 if work.rehearse else _AT_ONCE
    spread = ["-n", str(at_once), "--dist", "load"] if importlib.util.find_spec("xdist") else []
    run_tests(work, {name: f"tests/{name}" for name in work.wanted}, group, summary, options=["-m", "gpu", *spread])
