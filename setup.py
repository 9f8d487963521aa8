"""Builds csrc/ into laser_fast/_native: with nvcc for CUDA and CPU, with a C++ compiler alone for CPU, else not at all.

Needs no torch: the library speaks the apache-tvm-ffi ABI and serves every Python and torch version. Environment:
LASER_FAST_BUILD = auto (default: the best that works) | cuda | cpu (that or fail) | none; CUDA_HOME; CXX;
TORCH_CUDA_ARCH_LIST (e.g. "8.0;9.0+PTX"); MAX_JOBS (default: one job per 4 GiB of free memory, at most one per core).
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "laser_fast_native.so"
CPU_SOURCES = ("prefix_kv.cpp",)
# all by nvcc, which knows where the headers of CUDA are
CUDA_SOURCES = ("prefix_kv.cu", "prefix_kv_cuda.cpp")
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")  # nvcc before 12.8 does not know the last two


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME where that is set, else the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def find_cxx() -> str | None:
    """The compiler of CXX where that is set, else the first of the usual names on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cuda_targets(nvcc: str) -> list[str]:
    """`-gencode` options for TORCH_CUDA_ARCH_LIST, or our list as far as this nvcc knows it, the newest with PTX."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"compute_(\d+)", listed))
        wanted = [arch for arch in DEFAULT_ARCHITECTURES if arch.removesuffix("+PTX").replace(".", "") in known]
        wanted[-1] = wanted[-1].removesuffix("+PTX") + "+PTX"
    options = []
    for arch in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: each entry must look like 8.0, 9.0a or 12.0+PTX, got {arch!r}")
        number = "".join(match.group(1, 2, 3))
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def max_jobs() -> int:
    """MAX_JOBS, or as many compilers as cores and free memory (4 GiB each) allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, free // (4 << 30)))


def tvm_ffi_copy() -> Path:
    """A copy of tvm_ffi under build/: every isolated build has it elsewhere, so ninja would compile anew each time."""
    installed = importlib.metadata.distribution("apache-tvm-ffi")
    copy = ROOT / "build" / "native" / f"tvm_ffi-{installed.version}"
    if not copy.exists():
        part = copy.with_suffix(f".{os.getpid()}")
        for folder in ("include", "lib"):
            shutil.copytree(Path(str(installed.locate_file("tvm_ffi"))) / folder, part / folder)
        part.rename(copy)
    return copy


def write_ninja(level: str, folder: Path, cxx: str, nvcc: str | None) -> None:
    """Write build.ninja, unless it is there already with the same text (ninja then rebuilds only what changed)."""
    from ninja.ninja_syntax import Writer

    ffi = tvm_ffi_copy()
    flags = f"-O3 -std=c++17 -isystem '{ffi / 'include'}'"
    libraries = f"'-L{ffi / 'lib'}' -ltvm_ffi -lpthread"  # threads are part of libc since glibc 2.34 only
    text = io.StringIO()
    ninja = Writer(text)  # type: ignore[arg-type]  # its stub takes a stream for a string
    warned = f"{flags} -fPIC -fvisibility=hidden -Wall -Wextra"
    ninja.rule("cxx", f"'{cxx}' -MMD -MF $out.d {warned} -c $in -o $out", depfile="$out.d", deps="gcc")
    link = f"'{cxx}' -shared"
    if level == "cuda":
        hidden = f"-ccbin '{cxx}' -Xcompiler -fPIC,-fvisibility=hidden {' '.join(cuda_targets(str(nvcc)))}"
        compile_cuda = f"'{nvcc}' -MD -MF $out.d {flags} {hidden} -c $in -o $out"
        ninja.rule("nvcc", compile_cuda, depfile="$out.d", deps="gcc")
        link = f"'{nvcc}' -shared -ccbin '{cxx}'"  # with a static cudart
    ninja.rule("link", f"{link} $in -o $out {libraries}")
    sources = CPU_SOURCES + (CUDA_SOURCES if level == "cuda" else ())
    objects = [f"{source}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        ninja.build([target], "nvcc" if source in CUDA_SOURCES else "cxx", [str(ROOT / "csrc" / source)])
    ninja.build([LIBRARY], "link", objects)
    ninja.default(LIBRARY)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text.getvalue():
        file.write_text(text.getvalue())


def compile_library(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Build the best library this machine can, or the one that LASER_FAST_BUILD demands.

    Returns the library (None: pure Python) and what `laser-fast doctor` shows about it.
    Raises RuntimeError where a demanded library cannot be built.
    """
    demanded = os.environ.get("LASER_FAST_BUILD", "auto")
    if demanded not in ("auto", "none", "cpu", "cuda"):
        raise RuntimeError(f"LASER_FAST_BUILD: must be auto, none, cpu or cuda, got {demanded!r}")
    if demanded == "none":
        return None, {"level": "none", "reason": "LASER_FAST_BUILD=none"}
    cxx, nvcc, reasons = find_cxx(), find_nvcc(), []
    for level in ("cuda", "cpu") if demanded == "auto" else (demanded,):
        if cxx is None:
            reasons = ["no C++ compiler found when it was installed"]
        elif level == "cuda" and nvcc is None:
            reasons.append("no nvcc found (PATH, CUDA_HOME) when it was installed")
        else:
            try:
                write_ninja(level, folder / level, cxx, nvcc)
                # as a module: the script is not on PATH in every build environment
                command = [sys.executable, "-m", "ninja", "-C", str(folder / level), "-j", str(max_jobs())]
                subprocess.run(command, check=True)
            except (subprocess.CalledProcessError, OSError, ValueError) as error:
                reasons.append(f"the {level} build failed ({error})")
                print(f"laser-fast: WARNING: {reasons[-1]}; its messages are above", file=sys.stderr)
            else:
                return folder / level / LIBRARY, {"level": level, "reason": "; ".join(reasons)}
    if demanded != "auto":
        raise RuntimeError(f"LASER_FAST_BUILD={demanded}: {'; '.join(reasons)}")
    return None, {"level": "none", "reason": "; ".join(reasons)}


class BuildNative(build_ext):
    """Puts the library and build.json (what was built and why) into laser_fast/_native of the wheel or source tree."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("laser_fast", "_native", LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        library, facts = compile_library(ROOT / "build" / "native")
        target = Path(self.build_lib, "laser_fast", "_native", LIBRARY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # overwriting a library that a running process has mapped would crash it
        if library is not None:
            shutil.copyfile(library, target)
        facts["apache-tvm-ffi"] = importlib.metadata.version("apache-tvm-ffi")
        target.with_name("build.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"laser-fast: compiled library: {facts['level']}" + (f" ({facts['reason']})" if facts["reason"] else ""))

    def copy_extensions_to_source(self) -> None:
        """An editable install finds both files in the source tree; what an earlier install left there goes."""
        kept = ROOT / "laser_fast" / "_native"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(Path(self.build_lib, "laser_fast", "_native"), kept)


class PlatformWheel(bdist_wheel):
    """The library needs no particular Python: py3-none-<platform>, or py3-none-any where there is no library."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.bdist_dir, "laser_fast", "_native", LIBRARY).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["laser_fast", "laser_fast.*"]), "laser_fast.kernels"],
        ext_modules=[Extension("laser_fast_native", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
