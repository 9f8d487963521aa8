"""What runs on this machine: one line per component and per operation, with the reason and the remedy where one is off.

Nothing is looked at before `diagnose` is called, and nothing found there can make it fail.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

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
_TORCH_OPERATIONS = ("catalog_cross_entropy", "catalog_topk")  # the others have a Triton kernel


@dataclass(frozen=True)
class Component:
    """One line of the report.

    Attributes:
        name: "torch", "Triton", "op route_experts", ...
        version: Of the component, or the backend an operation runs on; empty where there is none.
        on: Whether it is used.
        reason: Why it is on or off, or a warning; may be empty for one that is on.
        remedy: What to do about it; empty where nothing is to be done.
        required: Whether laser_fast cannot work without it.
    """

    name: str
    version: str
    on: bool
    reason: str = ""
    remedy: str = ""
    required: bool = False


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


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


def _python() -> Component:
    system = f"{platform.system()} {platform.machine()}"
    return Component("Python", platform.python_version(), True, f"{platform.python_implementation()} on {system}")


def _laser_fast() -> Component:
    if _version("laser-fast") is None:
        return Component("laser_fast", laser_fast.__version__, True, "imported, not installed", "pip install -e .")
    return Component("laser_fast", laser_fast.__version__, True)


def _torch() -> Component:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    outside = _older_than_required("torch")
    remedy = "pip install -U torch" if outside else ""
    return Component("torch", torch.__version__, True, "; ".join(filter(None, [build, outside])), remedy, required=True)


def _cuda_device() -> Component:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        return Component("CUDA device", f"sm_{device.major}{device.minor}", True, f"{device.name}, {memory}")
    if torch.version.cuda is None:
        return Component("CUDA device", "", False, "torch is a CPU build", "for a GPU, install a CUDA build of torch")
    return Component("CUDA device", "", False, "torch sees no device", "check the driver with nvidia-smi")


def _triton() -> Component:
    import torch

    version = _version("triton")
    if not _importable("triton"):
        wanted = "pip install triton" if torch.cuda.is_available() else ""
        return Component("Triton", "", False, "not installed", wanted)
    if not torch.cuda.is_available():
        return Component("Triton", version or "", False, "no CUDA device; kernels run in Triton's interpreter in tests")
    return Component("Triton", version or "", True)


def _compiled_library() -> Component:
    from laser_fast.ops import backends

    library = backends.load_native()
    if library.level == "none":
        return Component("compiled library", "", False, library.reason, backends.NATIVE_REMEDY)
    return Component("compiled library", f"for {library.level}", True, library.reason)


def _transformers() -> Component:
    from packaging.version import Version

    version = _version("transformers")
    if version is None:
        return Component("transformers", "", False, "not installed", "pip install transformers", required=True)
    warning, remedy = _older_than_required("transformers"), "pip install -U transformers"
    if Version(version) < Version(_UNSAFE_TRANSFORMERS):
        warning = f"UNSAFE: before {_UNSAFE_TRANSFORMERS} a model's config.json can run code without trust_remote_code"
    return Component("transformers", version, True, warning, remedy if warning else "", required=True)


def _bitsandbytes() -> Component:
    version = _version("bitsandbytes")
    if version is None:
        remedy = 'for 4-bit models: pip install "laser-fast[4bit]"'
        return Component("bitsandbytes", "", False, "not installed; models load in full or half precision", remedy)
    return Component("bitsandbytes", version, True, "4-bit models can be loaded")


def _flash_attention() -> Component:
    import torch

    from laser_fast.lm.attention import flash as attention_flash

    name = "flash attention"
    fallback = "packed attention runs on torch's scaled_dot_product_attention, one call per bucket of lengths"
    if not torch.cuda.is_available():
        return Component(name, "", False, f"no CUDA device; {fallback}")
    kind, device = attention_flash.AttentionKind(causal=True, scale=1.0), torch.device("cuda", 0)
    chosen, _ = attention_flash.choose_fast(kind, device, grouped=True)
    if chosen == attention_flash.BUCKETS:
        return Component(name, "", False, f"this torch has none; {fallback}", "pip install -U torch")
    version = _version("flash-attn") if chosen == attention_flash.FLASH_ATTN else torch.__version__
    return Component(name, version or "", True, f"{chosen}, in half precision")


def _operation(name: str) -> Component:
    import torch

    import laser_fast.ops
    from laser_fast.ops import backends

    if not hasattr(laser_fast.ops, name):
        return Component(f"op {name}", "", False, "not in this version")
    gpu = torch.cuda.is_available()
    if name in _COMPILED_OPERATIONS:
        library = backends.load_native()
        absence = backends.cuda_absence(torch.cuda.current_device()) if gpu else ""
        if library.level != "none" and not absence:
            return Component(f"op {name}", "compiled " + ("CUDA" if gpu else "CPU"), True)
        reason = f"compiled {'CUDA' if gpu else 'CPU'} code: {absence or library.reason}"
        return Component(f"op {name}", "torch reference", True, reason, backends.NATIVE_REMEDY)
    if not gpu or name in _TORCH_OPERATIONS:
        reason = "no GPU kernel in this version" if gpu else "no CUDA device"
        return Component(f"op {name}", "torch reference", True, reason)
    absence = backends.triton_absence(torch.cuda.current_device())
    if absence:
        remedy = backends.TRITON_REMEDY if "not installed" in absence else ""
        return Component(f"op {name}", "torch reference", True, absence, remedy)
    return Component(f"op {name}", "Triton", True)


def _safely(name: str, probe: Callable[[], Component], required: bool) -> Component:
    try:
        return probe()
    except Exception as error:  # whatever is broken here is what the report is for
        return Component(name, "", False, f"{type(error).__name__}: {error}", f"reinstall {name}", required)


def diagnose() -> list[Component]:
    """Look at every component and operation; never raises. Loads torch, and on a GPU starts a CUDA context."""
    probes: list[tuple[str, Callable[[], Component], bool]] = [
        ("Python", _python, True),
        ("laser_fast", _laser_fast, True),
        ("torch", _torch, True),
        ("CUDA device", _cuda_device, False),
        ("Triton", _triton, False),
        ("compiled library", _compiled_library, False),
        ("transformers", _transformers, True),
        ("bitsandbytes", _bitsandbytes, False),
        ("flash attention", _flash_attention, False),
    ]
    components = [_safely(name, probe, required) for name, probe, required in probes]
    for name in _OPERATIONS:
        components.append(_safely(f"op {name}", lambda: _operation(name), False))
    return components


def _line(component: Component, width: int) -> str:
    text = f"{'on ' if component.on else 'off'}  {component.name:<{width}}  {component.version:<16}  {component.reason}"
    return (text + (f"  -> {component.remedy}" if component.remedy else "")).rstrip().replace("\n", " ")


def print_report(json_output: bool = False) -> int:
    """Print `diagnose()`, one line per component or as JSON.

    Returns:
        Exit code: 1 where something that laser_fast needs is off, else 0.
    """
    components = diagnose()
    if json_output:
        print(json.dumps({"version": laser_fast.__version__, "components": [asdict(c) for c in components]}, indent=1))
    else:
        width = max(len(component.name) for component in components)
        print("\n".join(_line(component, width) for component in components))
    return int(any(component.required and not component.on for component in components))
