"""Installing from source: with nvcc, with a C++ compiler alone, with neither - and never with torch in the build.

The three installations run pip for real, in a fresh environment and on a copy of the sources, with a PATH that has
only the allowed compilers. The rest calls the functions of setup.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the source tree, not only the tests", allow_module_level=True)

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]
OPERATIONS = ("inject_prefix_kv", "inject_prefix_kv_backward")
_NEEDS_CXX = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")
_NVCC = re.compile(r"nvcc(-.*)?")
_CXX = re.compile(r"(.+-)?(c\+\+|g\+\+|clang\+\+|gcc|cc|clang|c89|c99)(-[\d.]+)?")


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Build isolation downloads setuptools, ninja and apache-tvm-ffi."""
    target = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), "ninja"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy without anything built, so that the installation under test is not disturbed."""
    copy = tmp_path / "sources"
    built = shutil.ignore_patterns("_native", "__pycache__", "*.egg-info")
    for name in ("csrc", "kernels", "laser_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def path_without(folder: Path, *hidden: re.Pattern[str]) -> str:
    """A folder with a link to every program on PATH, but for the hidden ones; its name serves as PATH."""
    folder.mkdir()
    for entry in os.environ["PATH"].split(os.pathsep):
        for program in Path(entry).iterdir() if Path(entry).is_dir() else ():
            link = folder / program.name
            if not link.exists() and not any(pattern.fullmatch(program.name) for pattern in hidden):
                link.symlink_to(program)
    return str(folder)


def pip(python: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The pip of the tests, for another environment."""
    command = [sys.executable, "-m", "pip", "--python", python, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def fresh_python(package_index: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with nothing but what a build requires."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = str(place / "bin" / "python")
    requires = re.search(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert requires is not None
    done = pip(python, "install", "-q", *json.loads(requires[1]))
    assert done.returncode == 0, done.stderr
    return python


def install(python: str, sources: Path, path: str, *options: str, **variables: str) -> dict[str, str]:
    """`pip install` of the sources; returns the build facts and the place of the library.

    The build is in an environment of its own, or with "--no-build-isolation" in that of `python`, which has no torch.
    """
    kept = ("CUDA_HOME", "CUDA_PATH", "CXX", "LASER_FAST_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "MAX_JOBS")
    environment = {name: value for name, value in os.environ.items() if name not in kept} | {"PATH": path} | variables
    done = pip(python, "install", "-v", "--no-deps", *options, str(sources), env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    if "--no-build-isolation" not in options:
        (build_environment,) = re.findall(r"Successfully installed (.*\bninja-.*)", done.stdout + done.stderr)
        assert {name.rsplit("-", 1)[0] for name in build_environment.split()} >= {"apache-tvm-ffi", "setuptools"}
        assert not re.search(r"\btorch\b", build_environment)
    place = sources if "-e" in options else Path(python).parents[1]
    code = "import json, laser_fast, laser_fast.kernels as k; print(json.dumps([laser_fast.__file__, k.__file__]))"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=sources.parent, check=True)
    package, kernels = (Path(file) for file in json.loads(shown.stdout))
    assert package.is_relative_to(place) and kernels.is_relative_to(place)
    facts = json.loads((package.parent / "_native" / "build.json").read_text(encoding="utf-8"))
    library = package.parent / "_native" / "laser_fast_native.so"
    assert library.exists() is (facts["level"] != "none")
    return dict(facts) | {"library": str(library)}


def exported(library: str, name: str) -> bool:
    import tvm_ffi

    return bool(tvm_ffi.load_module(library).implements_function(name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@_NEEDS_CXX
def test_with_nvcc(sources: Path, fresh_python: str) -> None:
    facts = install(fresh_python, sources, os.environ["PATH"], "--no-build-isolation", TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert (facts["level"], facts["reason"]) == ("cuda", "")
    for name in OPERATIONS:
        assert exported(facts["library"], f"{name}_cpu")
        assert exported(facts["library"], f"{name}_cuda")


@pytest.mark.slow
@_NEEDS_CXX
def test_with_only_a_cxx_compiler(sources: Path, tmp_path: Path, fresh_python: str) -> None:
    path = path_without(tmp_path / "bin", _NVCC)
    editable, facts = (install(fresh_python, sources, path, "--no-build-isolation", *how) for how in (("-e",), ()))
    library = editable.pop("library")  # the other lies where the test before had one, which a process loads once
    assert editable == {name: fact for name, fact in facts.items() if name != "library"}
    assert facts["level"] == "cpu"
    assert facts["reason"] == "no nvcc found (PATH, CUDA_HOME) when it was installed"
    for name in OPERATIONS:
        assert exported(library, f"{name}_cpu")
        assert not exported(library, f"{name}_cuda")


@pytest.mark.slow
def test_with_no_compiler(sources: Path, tmp_path: Path, fresh_python: str) -> None:
    facts = install(fresh_python, sources, path_without(tmp_path / "bin", _NVCC, _CXX))
    assert (facts["level"], facts["reason"]) == ("none", "no C++ compiler found when it was installed")


@pytest.fixture
def setup_module(monkeypatch: Patch) -> ModuleType:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "LASER_FAST_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    specification = importlib.util.spec_from_file_location("laser_fast_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def old_nvcc(tmp_path: Path) -> Path:
    """Knows cards up to 9.0 and fails to compile."""
    lists = "echo compute_80; echo compute_86; echo compute_89; echo compute_90"
    return program(tmp_path / "cuda" / "bin" / "nvcc", f'if [ "$1" = --list-gpu-arch ]; then {lists}; else exit 1; fi')


def test_default_targets_are_those_nvcc_knows_and_the_newest_has_ptx(setup_module: ModuleType, old_nvcc: Path) -> None:
    assert setup_module.cuda_targets(str(old_nvcc)) == [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 86, 89, 90)),
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_the_arch_list_of_torch_is_honoured(setup_module: ModuleType, monkeypatch: Patch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    assert setup_module.cuda_targets("unused") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: each entry must look like .*, got 'Ampere'"):
        setup_module.cuda_targets("unused")


def test_jobs(setup_module: ModuleType, monkeypatch: Patch) -> None:
    assert 1 <= setup_module.max_jobs() <= (os.cpu_count() or 1)
    page = os.sysconf("SC_PAGE_SIZE")
    real: Callable[[str], int] = os.sysconf
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sysconf", lambda name: (9 << 30) // page if name == "SC_AVPHYS_PAGES" else real(name))
    assert setup_module.max_jobs() == 2  # 9 GiB free, 4 a job
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_module.max_jobs() == 7


@pytest.fixture
def cxx(setup_module: ModuleType, tmp_path: Path, monkeypatch: Patch) -> None:
    """A C++ compiler that makes an empty file of everything."""
    make = 'while [ "$1" != -o ]; do shift; done; : > "$2"'
    monkeypatch.setenv("CXX", str(program(tmp_path / "compiler", make)))


@pytest.mark.usefixtures("cxx")
def test_a_failing_cuda_build_falls_back_loudly(
    setup_module: ModuleType, old_nvcc: Path, tmp_path: Path, monkeypatch: Patch, capfd: Printed
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(old_nvcc.parents[1]))
    library, facts = setup_module.compile_library(tmp_path / "build")
    assert facts["level"] == "cpu" and "the cuda build failed" in facts["reason"]
    assert library.is_file()
    assert "WARNING: the cuda build failed" in capfd.readouterr().err


@pytest.mark.usefixtures("cxx")
def test_a_second_build_compiles_nothing(
    setup_module: ModuleType, tmp_path: Path, monkeypatch: Patch, capfd: Printed
) -> None:
    monkeypatch.setenv("LASER_FAST_BUILD", "cpu")
    for expected in ("-shared", "no work to do"):
        setup_module.compile_library(tmp_path / "build with a space")
        assert expected in capfd.readouterr().out


@pytest.mark.usefixtures("cxx")
def test_a_demanded_build_fails_where_it_cannot_be_had(
    setup_module: ModuleType, old_nvcc: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("LASER_FAST_BUILD", "cuda")
    for name, value, reason in (
        ("CUDA_HOME", str(tmp_path), "no nvcc found"),
        ("CUDA_HOME", str(old_nvcc.parents[1]), "the cuda build failed"),
        ("CXX", "no-such-compiler", r"no C\+\+ compiler found"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError, match=f"LASER_FAST_BUILD=cuda: {reason}"):
            setup_module.compile_library(tmp_path / "build")


def test_no_build_and_nonsense(setup_module: ModuleType, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("LASER_FAST_BUILD", "none")
    assert setup_module.compile_library(tmp_path) == (None, {"level": "none", "reason": "LASER_FAST_BUILD=none"})
    monkeypatch.setenv("LASER_FAST_BUILD", "gpu")
    with pytest.raises(RuntimeError, match="LASER_FAST_BUILD: must be auto, none, cpu or cuda, got 'gpu'"):
        setup_module.compile_library(tmp_path)
