"""Importing laser_fast has no side effects and needs nothing optional. Each case runs in a fresh process."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import laser_fast

OTHERS = ("__main__", "kernels")  # the command itself, and what needs Triton
ROOMS = ["", *(f".{room.name}" for room in pkgutil.iter_modules(laser_fast.__path__) if room.name not in OTHERS)]


def run_python(code: str) -> Any:
    """Run `code` in a fresh interpreter; the JSON it prints last comes back."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_of_the_package_loads_nothing_heavy() -> None:
    loaded = set(run_python("import laser_fast, sys, json; print(json.dumps(list(sys.modules)))"))
    assert not loaded & {"torch", "triton", "bitsandbytes", "tvm_ffi", "transformers", "laser_fast.ops"}


def test_import_of_every_room_loads_nothing_optional_and_patches_nothing() -> None:
    # torch and transformers may load Triton and bitsandbytes themselves: only what comes on top of them counts
    code = f"""
import importlib, json, sys
import torch, torch.nn.functional, transformers, transformers.modeling_utils, accelerate

OWNERS = [torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.functional, torch.nn.Linear, torch.autograd,
          torch.cuda, torch.optim.Optimizer, transformers.PreTrainedModel, transformers.modeling_utils,
          transformers.PreTrainedTokenizerBase, transformers.PretrainedConfig, accelerate, accelerate.Accelerator]

def picture():
    return [{{name: id(value) for name, value in vars(owner).items() if not name.startswith("__")}} for owner in OWNERS]

flags = lambda: [torch.get_default_dtype() == torch.float32, torch.get_num_threads(), torch.is_grad_enabled(),
                 torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()]
# what these names load lazily has to be there already
from transformers import AutoConfig, AutoModel, AutoTokenizer, AttentionInterface
loaded, before, flags_before = set(sys.modules), picture(), flags()
for room in {ROOMS!r}:
    importlib.import_module("laser_fast" + room)
changed = [f"{{owner.__name__}}.{{name}}" for owner, old, new in zip(OWNERS, before, picture())
           for name in old if new.get(name) != old[name]]
print(json.dumps([sorted(set(sys.modules) - loaded), torch.cuda.is_initialized(), changed, flags_before == flags()]))
"""
    loaded, cuda_started, changed, flags_kept = run_python(code)
    assert "laser_fast.ops" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"triton", "bitsandbytes", "tvm_ffi", "flash_attn"}
    assert not [name for name in loaded if name.startswith("laser_fast.kernels")]
    assert not cuda_started and changed == [] and flags_kept


def test_works_without_triton_and_without_the_compiled_library() -> None:
    code = """
import json, sys
sys.modules["triton"] = None
sys.modules["tvm_ffi"] = None
import torch, warnings
warnings.simplefilter("ignore")
import laser_fast
from laser_fast.ops import backends, inject_prefix_kv
text, prefix = torch.zeros(3, 1, 2), torch.ones(2, 1, 1, 2)
key, _, offsets = inject_prefix_kv(text, text, prefix, prefix, torch.tensor([0, 1, 3], dtype=torch.int32))
print(json.dumps([backends.load_native().level, key[:, 0, 0].tolist(), offsets.tolist()]))
"""
    level, key, offsets = run_python(code)
    assert level == "none"
    assert key == [1, 0, 1, 0, 0]
    assert offsets == [0, 2, 5]


@pytest.mark.parametrize("name", [name for name in laser_fast.__all__ if name != "__version__"])
def test_lazy_names_resolve(name: str) -> None:
    assert getattr(laser_fast, name) is not None
    assert name in dir(laser_fast)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'laser_fast' has no attribute 'nothing'"):
        _ = laser_fast.nothing


def test_kernels_are_importable_under_their_name_from_anywhere(tmp_path: Path) -> None:
    code = "import laser_fast.kernels, json; print(json.dumps(laser_fast.kernels.__doc__))"
    root = Path(__file__).resolve().parents[1]
    for folder in (tmp_path, root):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert "Triton kernels" in json.loads(done.stdout)


def test_the_folder_kernels_does_not_hide_a_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'the real one'\n")
    root = Path(__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]; import kernels; print(kernels.NAME)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "the real one"
