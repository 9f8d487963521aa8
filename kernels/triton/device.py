"""What launchers ask of the device their tensors are on."""

from __future__ import annotations

from functools import cache

import torch

_INTERPRETED = 132  # as an H100 has, in Triton's interpreter and where kernels are compiled for a GPU that is not there


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are, looked up once per device and process."""
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
