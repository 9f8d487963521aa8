"""What serves an operation, and where it is not there, one warning that says why - never an error, never at import."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from laser_fast.ops import backends
from laser_fast.ops.backends import MAX_EXPERTS, triton_absence, triton_serves


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was found out about this machine, and what was said already, is no part of these tests."""
    for cached in (triton_absence, backends.warn_fallback):
        cached.cache_clear()
    yield
    for cached in (triton_absence, backends.warn_fallback):
        cached.cache_clear()


def test_absent_library_names_the_reason_of_the_build(tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"level": "none", "reason": "no C++ compiler found"}))
    library = backends.load_native_from(tmp_path)
    assert (library.level, library.reason, library.module) == ("none", "no C++ compiler found", None)
    assert library.function("inject_prefix_kv_cpu") is None


def test_a_source_tree_that_was_never_installed_says_so(tmp_path: Path) -> None:
    assert backends.load_native_from(tmp_path).reason == "laser-fast was not installed with pip"


def test_broken_library_costs_one_warning_with_both_versions(tmp_path: Path) -> None:
    (tmp_path / "laser_fast_native.so").write_bytes(b"not a library")
    (tmp_path / "build.json").write_text(json.dumps({"level": "cuda", "reason": "", "apache-tvm-ffi": "0.0.1"}))
    with pytest.warns(RuntimeWarning, match=r"does not load \(built with apache-tvm-ffi 0\.0\.1, found \d") as caught:
        library = backends.load_native_from(tmp_path)
    assert len(caught) == 1
    assert library.level == "none"
    assert "does not load" in library.reason


def test_unknown_function_is_none() -> None:
    assert backends.load_native().function("no_such_function") is None


def test_code_for_the_cpu_gets_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Module:
        def implements_function(self, name: str) -> bool:
            return name == "some_op_cpu"

        def get_function(self, name: str) -> object:
            return lambda *arguments: calls.append(arguments)

    monkeypatch.setattr(backends, "load_native", lambda: backends.NativeLibrary("cpu", "", Module()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    compiled = backends.compiled_operation("some_op", torch.device("cpu"))
    assert compiled is not None
    compiled("tensor")
    assert calls == [("tensor", 3)]
    assert backends.compiled_operation("other_op", torch.device("cpu")) is None


def test_a_gpu_without_compiled_code_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_absence", lambda index: "no kernel image")
    with pytest.warns(RuntimeWarning, match="op_without_image: the torch reference runs .*: no kernel image"):
        assert backends.compiled_operation("op_without_image", torch.device("cuda", 0)) is None


def test_a_library_of_another_version_is_reported_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_absence", lambda index: "")
    monkeypatch.setattr(backends, "load_native", lambda: backends.NativeLibrary("none", "hidden by the test", None))
    with pytest.warns(RuntimeWarning, match="inject_of_tomorrow: .*built from another version of the sources"):
        assert backends.compiled_operation("inject_of_tomorrow", torch.device("cuda", 0)) is None


class OnGpu:
    """As much of a tensor on a CUDA device as is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32, index: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", index)


def _serves(*tensors: OnGpu, operation: str = "some_op", num_experts: int = 8) -> bool:
    return triton_serves(operation, *tensors, num_experts=num_experts)  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine that has Triton and an sm_90; a test changes it before it asks."""
    found: dict[str, object] = {"triton": True, "capability": (9, 0)}
    find_spec = importlib.util.find_spec

    def fake_find_spec(name: str, package: str | None = None) -> object:
        if name.partition(".")[0] != "triton":
            return find_spec(name, package)
        return object() if found["triton"] else None

    monkeypatch.setattr(importlib.util, "find_spec", fake_find_spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found["capability"])
    return found


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_serve(machine: dict[str, object], capability: tuple[int, int], dtype: torch.dtype) -> None:
    machine["capability"] = capability
    assert triton_absence(0) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _serves(OnGpu(dtype), OnGpu(torch.float32))


def test_without_triton_the_reference_says_so_once_per_operation(machine: dict[str, object]) -> None:
    machine["triton"] = False
    assert triton_absence(0) == "triton is not installed"
    message = (
        "^some_op: the torch reference runs in place of the compiled kernel: triton is not installed; "
        "pip install triton; `laser-fast doctor` lists what runs$"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert [_serves(OnGpu()) for _ in range(3)] == [False] * 3
    assert len(caught) == 1
    with pytest.warns(RuntimeWarning, match="^other_op: "):
        assert not _serves(OnGpu(), operation="other_op")


@pytest.mark.usefixtures("machine")
def test_every_device_is_looked_up_once_and_an_old_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return (9, 0) if index == 0 else (7, 5)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    message = "some_op: .*: the device is sm_75, the kernels need sm_80 or newer"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert [_serves(OnGpu(index=index)) for index in (0, 1, 0, 1)] == [True, False, True, False]
    assert asked == [0, 1] and len(caught) == 1


def test_float64_and_too_many_experts_stay_with_the_reference_quietly(machine: dict[str, object]) -> None:
    single, double = OnGpu(), OnGpu(torch.float64)
    assert MAX_EXPERTS == 256 and _serves(single, num_experts=256)
    for machine["triton"] in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not _serves(single, double) and not _serves(double, single)
            assert not _serves(single, num_experts=257)


def test_a_cpu_tensor_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_absence", lambda index: pytest.fail("asked"))
    assert not triton_serves("some_op", torch.ones(1))
    assert not triton_serves("some_op", torch.ones(1, device="meta"))
