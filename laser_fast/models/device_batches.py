"""Batches on the device of a model, whose lengths and ids stay known to the host."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laser_fast.data.batches import PackedBatch
from laser_fast.ops.host_copies import to_device


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch on a device, copied from host memory without waiting; its values are never read back."""
    if batch.items.device.type != "cpu" or device.type == "cpu":
        return batch.to(device)
    moved: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            moved[name] = to_device(value, device)
        elif isinstance(value, PackedBatch):
            moved[name] = on_device(value, device)
    return replace(batch, **moved)
