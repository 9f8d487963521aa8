"""Host memory and time to load a language model, above what the imports take.

    python bench/load_memory.py random:llama-3-8b --out bench/results/cpu/load-random-8b.json

The peak is the kernel's high-water mark of the process, so everything counts: packed weights, embeddings, what is
drawn or read on the way, and pages of mapped files. A tiny model is loaded first, which imports all there is to import.
"""

import platform
import time
from pathlib import Path
from typing import Any

import torch
from recording import parser_of, record

from laser_fast.config import LanguageModelConfig, build_config
from laser_fast.lm.loading.language_model import load_model


def status_bytes(field: str) -> int:
    """A size in /proc/self/status: VmHWM, the largest resident set so far, or VmRSS, that of now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"status_bytes: /proc/self/status must have {field}, got none; this needs Linux")


def load(path: str, dtype: str, quantization: str) -> torch.nn.Module:
    """As a training run would load it."""
    settings = {"path": path, "dtype": dtype, "quantization": quantization}
    return load_model(build_config(LanguageModelConfig, settings))


def measure(path: str, dtype: str, quantization: str) -> dict[str, Any]:
    """Peak and final resident bytes above those of the imports, seconds, and the bytes that the model must take."""
    load("random:llama-tiny", dtype, quantization)
    before = status_bytes("VmHWM")
    start = time.perf_counter()
    model = load(path, dtype, quantization)
    seconds = time.perf_counter() - start
    table = model.get_input_embeddings().weight
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states if state is not None)
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return {
        "seconds": seconds,
        "peak_bytes": status_bytes("VmHWM") - before,
        "resident_bytes": status_bytes("VmRSS") - before,
        "imports_bytes": before,
        "peak_bytes_with_imports": status_bytes("VmHWM"),
        "embedding_bytes": table.nbytes,
        "layer_bytes": sum(parameter.nbytes for parameter in model.parameters()) - table.nbytes + scales,
        "linear_weights": sum(layer.in_features * layer.out_features for layer in linears),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("path", help="as lm.path: a folder or random:SHAPE")
    parser.add_argument("--dtype", default="auto", help="as lm.dtype")
    parser.add_argument("--quantization", default="nf4", help="as lm.quantization")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    facts = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "model": arguments.path,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        **measure(arguments.path, arguments.dtype, arguments.quantization),
    }
    record(arguments.out, facts)
    for name in ("peak_bytes", "resident_bytes", "imports_bytes", "layer_bytes", "embedding_bytes"):
        print(f"{name:18}{facts[name] / 2**30:8.3f} GiB")
    print(f"{'seconds':18}{facts['seconds']:8.1f}")


if __name__ == "__main__":
    main()
