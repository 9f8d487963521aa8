"""Item 2: of every family of kernels a few cases against float64, in one process."""

from __future__ import annotations

from typing import NamedTuple

from gpu.work import Found, Work

_MOST = 4  # cases of a family: each compiles kernels of its own


class Family(NamedTuple):
    """A test that sets a kernel against float64.

    Attributes:
        test: file and function, from tests/.
        on_gpu: part of the ids of the cases that run on a GPU.
        rehearsed: of those that run in Triton's interpreter.
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
    """Of the families."""
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
    run_tests(work, files, group, summary, most=_MOST)
