"""The CPU library under the address and undefined-behaviour sanitizers: its loops, and the functions it exports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("prefix_kv_fuzz.cpp")
ITERATIONS = 300  # of ten checks each, with some thousand threads
CALLS = 10_000

# threads start at 64 bytes, so that small inputs are split as well
FLAGS = ["-std=c++17", "-O0", "-g", "-pthread", "-DLASER_FAST_BYTES_PER_THREAD=64", "-fno-sanitize-recover=all"]
SANITIZERS = "-fsanitize=address,undefined"


def compiler_with_sanitizers(folder: Path) -> str:
    """A compiler whose sanitized programs run here; the test is skipped where there is none."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    command = [compiler, *FLAGS, SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode or subprocess.run([folder / "probe"], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no sanitizers: {built.stderr.strip().splitlines()[-1:]}")
    return compiler


@pytest.mark.slow
def test_random_layouts_and_spoilt_arguments_under_the_sanitizers(tmp_path: Path) -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="the exported functions take its tensors")
    if not DRIVER.parents[2].joinpath("csrc").is_dir():
        pytest.skip("needs the source tree, not only the tests")
    compiler, program, ffi = compiler_with_sanitizers(tmp_path), tmp_path / "fuzz", Path(tvm_ffi.__file__).parent
    libraries = ["-isystem", str(ffi / "include"), f"-L{ffi / 'lib'}", f"-Wl,-rpath,{ffi / 'lib'}", "-ltvm_ffi"]
    subprocess.run([compiler, *FLAGS, SANITIZERS, str(DRIVER), "-o", str(program), *libraries], check=True)
    done = subprocess.run([program, str(ITERATIONS), str(CALLS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    answered, refused = (int(part.split()[0]) for part in done.stdout.split(","))
    assert answered + refused == CALLS and min(answered, refused) > CALLS // 4
