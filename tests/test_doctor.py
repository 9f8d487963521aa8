"""The report of `laser-fast doctor`: complete, honest about what is missing, and never an exception."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import laser_fast.ops
from laser_fast import doctor
from laser_fast.cli import main
from laser_fast.lm.attention import flash as attention_flash
from laser_fast.ops import backends, gated_product, rms_norm

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]


def report(name: str) -> doctor.Component:
    (found,) = [component for component in doctor.diagnose() if component.name == name]
    return found


def pretend_version(monkeypatch: Patch, distribution: str, version: str | None) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name != distribution:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)


def test_every_component_and_operation_has_one_line(capsys: Printed) -> None:
    components = doctor.diagnose()
    assert all(component.reason for component in components if not component.on)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("on ") for line in lines] == [component.on for component in components]
    for name in ("torch", "CUDA device", "Triton", "compiled library", "transformers", "bitsandbytes"):
        assert sum(f"  {name}  " in line for line in lines) == 1, name
    rooms = (laser_fast.ops, gated_product, rms_norm)
    references = {
        name.removesuffix("_reference") for room in rooms for name in vars(room) if name.endswith("_reference")
    }
    assert {c.name.removeprefix("op ") for c in components if c.name.startswith("op ") and c.on} == references
    assert main(["doctor", "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert parsed["version"] == metadata.version("laser-fast")
    assert parsed["components"] == [asdict(component) for component in components]


def test_unsafe_transformers_is_named(monkeypatch: Patch) -> None:
    pretend_version(monkeypatch, "transformers", "5.2.9")
    assert report("transformers").reason.startswith("UNSAFE")
    assert "pip install -U transformers" in report("transformers").remedy
    pretend_version(monkeypatch, "transformers", "5.10.0")  # as a string it would sort before 5.3.0
    assert "UNSAFE" not in report("transformers").reason
    assert "outside what laser-fast needs" in report("transformers").reason


@pytest.mark.parametrize(
    ("distribution", "status", "remedy"),
    [("transformers", 1, "pip install transformers"), ("bitsandbytes", 0, 'pip install "laser-fast[4bit]"')],
)
def test_a_missing_required_component_fails_the_command(
    distribution: str, status: int, remedy: str, monkeypatch: Patch, capsys: Printed
) -> None:
    pretend_version(monkeypatch, distribution, None)
    assert not report(distribution).on and remedy in report(distribution).remedy
    assert main(["doctor"]) == status
    assert f"-> {report(distribution).remedy}" in capsys.readouterr().out


def test_missing_library_is_reported_with_reason_and_reference(monkeypatch: Patch) -> None:
    absent = backends.NativeLibrary("none", "no C++ compiler found when it was installed", None)
    monkeypatch.setattr(backends, "load_native", lambda: absent)
    assert not report("compiled library").on
    assert report("compiled library").reason == absent.reason
    assert report("op inject_prefix_kv").version == "torch reference"
    assert absent.reason in report("op inject_prefix_kv").reason


def test_library_in_use_is_reported() -> None:
    if backends.load_native().module is None:
        pytest.skip(f"no compiled library: {backends.load_native().reason}")
    assert report("compiled library").on
    wanted = "compiled CUDA" if torch.cuda.is_available() else "compiled CPU"
    assert report("op inject_prefix_kv").version == wanted


def test_missing_triton(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (report("Triton").on, report("Triton").reason) == (False, "not installed")


@pytest.mark.parametrize(
    ("absence", "version", "remedy"),
    [
        ("", "Triton", ""),
        ("triton is not installed", "torch reference", "pip install triton"),
        ("the device is sm_75, the kernels need sm_80 or newer", "torch reference", ""),
    ],
)
def test_operations_with_a_triton_kernel(absence: str, version: str, remedy: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "triton_absence", lambda index: absence)
    for name in ("route_experts", "dispatch_queries", "combine_queries", "gated_product", "rms_norm"):
        line = report(f"op {name}")
        assert (line.version, line.reason, line.remedy) == (version, absence, remedy)
    assert report("op catalog_topk").reason == "no GPU kernel in this version"


@pytest.mark.parametrize(
    ("chosen", "on", "reason"),
    [
        ("flash-attn", True, "flash-attn, in half precision"),
        ("torch flash", True, "torch flash, in half precision"),
        ("torch flash, keys expanded", True, "torch flash, keys expanded, in half precision"),
        ("buckets", False, "this torch has none; packed attention runs on torch's scaled_dot_product_attention"),
    ],
)
def test_the_attention_that_runs(chosen: str, on: bool, reason: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(attention_flash, "choose_fast", lambda kind, device, grouped: (chosen, None))
    assert not report("flash attention").on or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = report("flash attention")
    assert line.on == on
    assert line.reason.startswith(reason)


def test_a_probe_that_fails_becomes_a_line(monkeypatch: Patch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert not report("CUDA device").on
    assert report("CUDA device").reason == "RuntimeError: driver mismatch"


def test_looking_changes_no_file(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    doctor.diagnose()
    assert list(tmp_path.iterdir()) == []
