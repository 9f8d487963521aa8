"""Whether the Triton kernels serve a device: asked at the first call on a GPU, never at import."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from laser_fast.ops.native import warn_fallback

MAX_EXPERTS = 256  # a tile of the kernels holds all experts; more run as the torch reference
REMEDY = "pip install triton"
_OLDEST = (8, 0)  # bfloat16 and TF32 products


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules holds something that is no module
        return False


@cache
def triton_absence(device_index: int) -> str:
    """Empty where Triton kernels run on that CUDA device, else the reason; looked up once per device and process."""
    if not _installed():
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < _OLDEST:
        return f"the device is sm_{capability[0]}{capability[1]}, the kernels need sm_80 or newer"
    return ""


def triton_serves(operation: str, *tensors: Tensor, num_experts: int = 1) -> bool:
    """Whether the fused kernel takes these tensors on their CUDA device; warns once where it is missing altogether.

    float64, which only tests of gradients use, and more than MAX_EXPERTS experts stay with the torch reference.
    """
    if num_experts > MAX_EXPERTS or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    absence = triton_absence(tensors[0].device.index)
    if absence:
        warn_fallback(operation, absence, REMEDY)
    return not absence
