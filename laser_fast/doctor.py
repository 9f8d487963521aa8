"""What runs on this machine: one line per component and per operation, with the reason and the remedy where one is off.

Nothing is looked at before `diagnose` is called, and nothing found there can make it fail.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import NamedTuple

import laser_fast

_UNSAFE_TRANSFORMERS = "5.3.0"  # older ones run code named in config.json even where trust_remote_code is off
_OPERATIONS = (
    "route_experts",
    "dispatch_queries",
    "combine_queries",
    "inject_prefix_kv",
    "rotary_embedding",
    "catalog_cross_entropy",
    "catalog_topk",
    "gated_product",
    "rms_norm",
)
_COMPILED_OPERATIONS = ("inject_prefix_kv",)
_REFERENCE = "torch reference"
_TORCH_OPERATIONS = ("catalog_cross_entropy", "catalog_topk")  # the others have a Triton kernel


@dataclass(frozen=True)
class Component:
    """One line of the report.

    Attributes:
        name: "torch", "Triton", "op route_experts", ...
        version: of the component, or the backend that an operation runs on; empty where there is none.
        on: whether it is used.
        reason: why it is on or off, or a warning; may be empty for one that is on.
        remedy: what to do about it; empty where nothing is to be done.
        required: whether laser_fast cannot work without it.
    """

    name: str
    version: str
    on: bool
    reason: str = ""
    remedy: str = ""
    required: bool = False


class _Found(NamedTuple):
    """What a probe tells of its component; see `Component`."""

    version: str = ""
    on: bool = True
    reason: str = ""
    remedy: str = ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _older_than_required(distribution: str) -> str:
    """A sentence if the installed version is outside the bounds of our own package metadata, else empty."""
    from packaging.requirements import Requirement

    installed = _version(distribution)
    if installed is None or _version("laser-fast") is None:
        return ""
    declared = [Requirement(line) for line in metadata.requires("laser-fast") or []]
    bounds = next((r.specifier for r in declared if r.name == distribution and r.marker is None), None)
    if bounds is None or bounds.contains(installed, prereleases=True):
        return ""
    return f"{installed} is outside what laser-fast needs ({bounds})"


def _python() -> _Found:
    system = f"{platform.system()} {platform.machine()}"
    return _Found(platform.python_version(), True, f"{platform.python_implementation()} on {system}")


def _laser_fast() -> _Found:
    if _version("laser-fast") is None:
        return _Found(laser_fast.__version__, True, "imported, not installed", "pip install -e .")
    return _Found(laser_fast.__version__)


def _torch() -> _Found:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    outside = _older_than_required("torch")
    reason = "; ".join(filter(None, [build, outside]))
    return _Found(torch.__version__, True, reason, "pip install -U torch" if outside else "")


def _cuda_device() -> _Found:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        return _Found(f"sm_{device.major}{device.minor}", True, f"{device.name}, {memory}")
    if torch.version.cuda is None:
        return _Found("", False, "torch is a CPU build", "for a GPU, install a CUDA build of torch")
    return _Found("", False, "torch sees no device", "check the driver with nvidia-smi")


def _triton() -> _Found:
    import torch

    try:
        installed = importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules holds something that is no module
        installed = False
    gpu = torch.cuda.is_available()
    if not installed:
        return _Found("", False, "not installed", "pip install triton" if gpu else "")
    return _Found(
        _version("triton") or "", gpu, "" if gpu else "no CUDA device; kernels run in Triton's interpreter in tests"
    )


def _compiled_library() -> _Found:
    from laser_fast.ops import backends

    library = backends.load_native()
    if library.level == "none":
        return _Found("", False, library.reason, backends.NATIVE_REMEDY)
    return _Found(f"for {library.level}", True, library.reason)


def _transformers() -> _Found:
    from packaging.version import Version

    version = _version("transformers")
    if version is None:
        return _Found("", False, "not installed", "pip install transformers")
    warning = _older_than_required("transformers")
    if Version(version) < Version(_UNSAFE_TRANSFORMERS):
        warning = f"UNSAFE: before {_UNSAFE_TRANSFORMERS} a model's config.json can run code without trust_remote_code"
    return _Found(version, True, warning, "pip install -U transformers" if warning else "")


def _bitsandbytes() -> _Found:
    version = _version("bitsandbytes")
    if version is None:
        remedy = 'for 4-bit models: pip install "laser-fast[4bit]"'
        return _Found("", False, "not installed; models load in full or half precision", remedy)
    return _Found(version, True, "4-bit models can be loaded")


def _flash_attention() -> _Found:
    import torch

    from laser_fast.lm.attention import flash

    fallback = "packed attention runs on torch's scaled_dot_product_attention, one call per bucket of lengths"
    if not torch.cuda.is_available():
        return _Found("", False, f"no CUDA device; {fallback}")
    kind, device = flash.AttentionKind(causal=True, scale=1.0), torch.device("cuda", 0)
    chosen, _ = flash.choose_fast(kind, device, grouped=True)
    if chosen == flash.BUCKETS:
        return _Found("", False, f"this torch has none; {fallback}", "pip install -U torch")
    version = _version("flash-attn") if chosen == flash.FLASH_ATTN else torch.__version__
    return _Found(version or "", True, f"{chosen}, in half precision")


def _operation(name: str) -> _Found:
    import torch

    from laser_fast.ops import backends

    gpu = torch.cuda.is_available()
    device = "CUDA" if gpu else "CPU"
    if name in _COMPILED_OPERATIONS:
        library = backends.load_native()
        absence = backends.cuda_absence(torch.cuda.current_device()) if gpu else ""
        if library.level != "none" and not absence:
            return _Found(f"compiled {device}")
        return _Found(_REFERENCE, True, f"compiled {device} code: {absence or library.reason}", backends.NATIVE_REMEDY)
    if not gpu or name in _TORCH_OPERATIONS:
        return _Found(_REFERENCE, True, "no GPU kernel in this version" if gpu else "no CUDA device")
    if absence := backends.triton_absence(torch.cuda.current_device()):
        return _Found(_REFERENCE, True, absence, backends.TRITON_REMEDY if "not installed" in absence else "")
    return _Found("Triton")


_COMPONENTS: dict[str, Callable[[], _Found]] = {
    "Python": _python,
    "laser_fast": _laser_fast,
    "torch": _torch,
    "CUDA device": _cuda_device,
    "Triton": _triton,
    "compiled library": _compiled_library,
    "transformers": _transformers,
    "bitsandbytes": _bitsandbytes,
    "flash attention": _flash_attention,
} | {f"op {name}": partial(_operation, name) for name in _OPERATIONS}


def diagnose() -> list[Component]:
    """Look at every component and operation; never raises. Loads torch, and on a GPU starts a CUDA context."""
    components = []
    for name, probe in _COMPONENTS.items():
        try:
            found = probe()
        except Exception as error:  # whatever is broken here is what the report is for
            found = _Found("", False, f"{type(error).__name__}: {error}", f"reinstall {name}")
        components.append(Component(name, *found, required=name in ("torch", "transformers")))
    return components
