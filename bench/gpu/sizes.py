"""Sizes of the run on a GPU, and of its rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import replace

from reporting import settings

ON_GPU = settings.ON_GPU
REHEARSED = replace(
    settings.ON_CPU,
    copy_floats=2**14,
    matmul_size=64,
    shapes=("llama-tiny",),
    tokens=(128,),
    mode_tokens=128,
    waterfall=("llama-tiny", 128),
    card_shape="llama-tiny",
    card_mformer={"width": 16, "num_layers": 1, "num_heads": 2, "num_queries": 2},
    rounds_s=0.01,
)
