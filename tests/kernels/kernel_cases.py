"""Inputs that the tests of several kernels share."""

from __future__ import annotations

import pytest
import torch

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter truncates where GPUs round
]
ROUTING_MODES = [  # the weighting is computed in float32 whatever the states are, so each is combined with one dtype
    pytest.param(torch.float32, "softmax", id="fp32-softmax"),
    pytest.param(torch.float16, "renormalize", id="fp16-renormalize"),
    pytest.param(torch.bfloat16, "softmax", id="bf16-softmax", marks=pytest.mark.gpu),
]
ROUTING_CASES = [  # history lengths, width, experts, chosen experts; each pass adds what its own tiles need
    pytest.param((1,), 1, 4, 2, id="one-item-of-width-1"),
    pytest.param((0, 3, 0, 0, 5, 1, 0), 8, 4, 2, id="empties-everywhere"),
    pytest.param((0, 0), 8, 4, 2, id="all-empty"),
    pytest.param((), 8, 4, 2, id="no-user"),
    pytest.param((3, 4), 8, 1, 1, id="E1"),
    pytest.param((3, 4, 2), 8, 5, 5, id="k=E"),
    pytest.param((7, 1, 20, 2), 33, 7, 3, id="E7-width-33"),
    pytest.param((9, 5, 21), 50, 33, 4, id="E33"),
    pytest.param((9, 3), 40, 100, 5, id="E100"),
    pytest.param((5, 4), 24, 256, 2, id="E256"),
]
