"""A compiled library that is absent or broken costs a reason, and at most one warning - never the import."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from laser_fast.ops import native


def test_absent_library_names_the_reason_of_the_build(tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"level": "none", "reason": "no C++ compiler found"}))
    library = native.load_native_from(tmp_path)
    assert (library.level, library.reason, library.module) == ("none", "no C++ compiler found", None)
    assert library.function("inject_prefix_kv_cpu") is None


def test_a_source_tree_that_was_never_installed_says_so(tmp_path: Path) -> None:
    assert native.load_native_from(tmp_path).reason == "laser-fast was not installed with pip"


def test_broken_library_costs_one_warning_with_both_versions(tmp_path: Path) -> None:
    (tmp_path / "laser_fast_native.so").write_bytes(b"not a library")
    (tmp_path / "build.json").write_text(json.dumps({"level": "cuda", "reason": "", "apache-tvm-ffi": "0.0.1"}))
    with pytest.warns(RuntimeWarning, match=r"does not load \(built with apache-tvm-ffi 0\.0\.1, found \d") as caught:
        library = native.load_native_from(tmp_path)
    assert len(caught) == 1
    assert library.level == "none"
    assert "does not load" in library.reason


def test_unknown_function_is_none() -> None:
    assert native.load_native().function("no_such_function") is None


def test_fallback_warns_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"some_op: the torch reference runs .*: no driver; .*laser-fast doctor"):
        native.warn_fallback("some_op", "no driver")
    with warnings.catch_warnings(record=True) as repeated:
        warnings.simplefilter("always")
        native.warn_fallback("some_op", "no driver")
    assert not repeated


def test_code_for_the_cpu_gets_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Module:
        def implements_function(self, name: str) -> bool:
            return name == "some_op_cpu"

        def get_function(self, name: str) -> object:
            return lambda *arguments: calls.append(arguments)

    monkeypatch.setattr(native, "load_native", lambda: native.NativeLibrary("cpu", "", Module()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    compiled = native.compiled_operation("some_op", torch.device("cpu"))
    assert compiled is not None
    compiled("tensor")
    assert calls == [("tensor", 3)]
    assert native.compiled_operation("other_op", torch.device("cpu")) is None


def test_a_gpu_without_compiled_code_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_absence", lambda index: "no kernel image")
    with pytest.warns(RuntimeWarning, match="op_without_image: the torch reference runs .*: no kernel image"):
        assert native.compiled_operation("op_without_image", torch.device("cuda", 0)) is None
