"""On what a call runs, and how the package is made importable where nobody has installed it.

Nothing here imports torch: the scheduler must not hold a context of the device.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nvidia_smi

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
_PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "bitsandbytes", "apache-tvm-ffi", "liger-kernel"),
    *("cut-cross-entropy", "peft", "pydantic", "pytest", "pytest-benchmark", "pytest-xdist", "laser-fast"),
)
_CODE = ("laser_fast", "kernels", "csrc", "bench", "setup.py", "pyproject.toml")
_SITES = ROOT / "build" / "gpu-site"
_BUILD_S = 120.0
_IMPORTS = "import torch, triton, bitsandbytes, transformers.models.llama.modeling_llama"


def facts(command: str, commit: str | None) -> dict[str, Any]:
    """Device, versions, commit, command and date."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        **nvidia_smi.device(),
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": commit or _commit() or f"files {digest(ROOT, _CODE)[:12]}",
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return said.stdout.strip() if said.returncode == 0 else None


def digest(root: Path, parts: Sequence[str]) -> str:
    """A hash over the names and contents of the source files there."""
    kinds = {".py", ".cu", ".cpp", ".h", ".toml", ".yaml", ".json"}
    whole = hashlib.sha256()
    for part in parts:
        place = root / part
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in kinds)
        for file in files:
            if "_native" not in file.parts and "results" not in file.parts:
                whole.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return whole.hexdigest()


def environment(sites: Sequence[Path], *, rehearse: bool) -> dict[str, str]:
    """Of an item's process: these folders and bench/ first, and never the root of the checkout.

    There `laser_fast` has no `laser_fast.kernels`, and the folder kernels/ may hide Hugging Face's package.
    """
    given = [Path(part).resolve() for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    folders = dict.fromkeys([*(site.resolve() for site in sites), BENCH, *(part for part in given if part != ROOT)])
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of a test around us
    known = own | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONSAFEPATH": "1"}
    known |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if rehearse:
        known |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return known


def importable(sites: Sequence[Path], *, rehearse: bool) -> tuple[dict[str, str], str]:
    """The environment in which `laser_fast` is the code of this checkout, and how that came about.

    An installation that is this code is taken as it is. Else the package is built into build/gpu-site, without an index
    and for the capability of this device alone; where that fails its files are copied there, without the compiled
    library.
    """
    found = environment(sites, rehearse=rehearse)
    if _imports_ours(found):
        return found, "as it is installed"
    site = _SITES / digest(ROOT, ("laser_fast", "kernels", "csrc", "setup.py"))[:12]
    found = environment([site, *sites], rehearse=rehearse)
    if (site / "done").exists():
        return found, (site / "done").read_text(encoding="utf-8")
    shutil.rmtree(site, ignore_errors=True)
    with _read_ahead(found):
        how = _build(site, found)
    if how:
        shutil.rmtree(site, ignore_errors=True)
        _copy(site)
        how = f"copied, without the compiled library: {how}"
    how = how or f"built for this device, compiled library: {_level(site)}"
    (site / "done").write_text(how, encoding="utf-8")
    return found, how


def _imports_ours(found: dict[str, str]) -> bool:
    look = (
        "import importlib.util as u; s = u.find_spec('laser_fast'); "
        "print(s.origin if s and u.find_spec('laser_fast.kernels') else '')"
    )
    said = subprocess.run([sys.executable, "-c", look], env=found, capture_output=True, text=True, check=False)
    return said.stdout.strip() == str(ROOT / "laser_fast" / "__init__.py")


@contextmanager
def _read_ahead(found: dict[str, str]) -> Iterator[None]:
    """Meanwhile what every item imports is read from the disk: the first time takes longer than some items."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    reading = subprocess.Popen([sys.executable, "-c", _IMPORTS], env=found, **quiet)
    try:
        yield
    finally:
        reading.kill()
        reading.wait()


def _build(site: Path, found: dict[str, str]) -> str:
    """Empty, or why it failed."""
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    capability = nvidia_smi.device()["capability"]
    build = found | ({"TORCH_CUDA_ARCH_LIST": capability} if capability else {"LASER_FAST_BUILD": "cpu"})
    for stale in (ROOT / "build").glob("lib*"):  # setuptools would install what an earlier build left there
        shutil.rmtree(stale)
    command = [sys.executable, *words, "--target", str(site), str(ROOT)]
    try:
        said = subprocess.run(command, env=build, capture_output=True, text=True, timeout=_BUILD_S, check=False)
    except subprocess.TimeoutExpired:
        return f"pip was not done after {_BUILD_S:g} s"
    lines = said.stderr.strip().splitlines() or ["no message"]
    return "" if said.returncode == 0 else f"pip ended with status {said.returncode}: {lines[-1]}"


def _level(site: Path) -> str:
    """For what its library was built: cuda, or less where nvcc or a compiler is missing."""
    facts = json.loads((site / "laser_fast" / "_native" / "build.json").read_text(encoding="utf-8"))
    return f"{facts['level']} ({facts['reason']})" if facts["reason"] else str(facts["level"])


def _copy(site: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "_native")
    shutil.copytree(ROOT / "laser_fast", site / "laser_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels" / "triton", site / "laser_fast" / "kernels", ignore=ignored)
