"""How large everything is that a report measures: on a GPU, on a CPU, and smaller still in the tests."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

_AUTHORS_MFORMER = {"width": 768, "num_layers": 12, "num_heads": 12, "num_experts": 8, "num_queries": 32}


@dataclass(frozen=True)
class Settings:
    """Sizes of one report.

    Attributes:
        minutes: for the whole report.
        dtype: of the language models' activations.
        copy_floats: float32 numbers that the bandwidth is measured with, too many for any cache.
        matmul_size: side of the square matrices that the rate of products is measured with.
        kernels: which benchmarks of single operations, as `pytest -k` takes it.
        shapes: language models, the last one the largest; see `reporting.models`.
        tokens: packed tokens of a step.
        mode_tokens: packed tokens of the step that is run in every mode of checkpointing.
        waterfall: shape and packed tokens.
        users: sequences of a batch beside the padded forms; the authors' form has 8.
        paper_mformer: whether M-Former has the size that the Laser authors use, else the demonstration's.
        card_shape: language model whose fit on cards is planned, and measured on a GPU.
        training: "full" is the demonstration's preset, "reduced" a fraction of its users and of its schedule.
        rounds_s: seconds of measuring for one row of the step.
        shares: of the time, by section; what one leaves over goes to the next.
        card_mformer: settings of the M-Former of the plan for cards.
    """

    minutes: float
    dtype: str
    copy_floats: int
    matmul_size: int
    kernels: str
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    mode_tokens: int
    waterfall: tuple[str, int]
    users: int
    paper_mformer: bool
    card_shape: str
    training: Literal["full", "reduced"]
    rounds_s: float
    shares: Mapping[str, int]
    weights: tuple[str, ...] = ("nf4", "none")
    card_mformer: Mapping[str, int] = field(default_factory=lambda: _AUTHORS_MFORMER)
    cards: tuple[str, ...] = ("8GB", "12GB", "16GB", "24GB")


_SHARES = {"environment": 1, "roofs": 2}
ON_GPU = Settings(
    minutes=9.0,
    dtype="bfloat16",
    copy_floats=2**28,
    matmul_size=8192,
    # compiling takes most of the time, so of the three passes and of the modes only the one that a step is made of
    kernels="(forward+backward and graph and not graph-warm) or (forward+backward and catalog) or topk or layers "
    "or shared_prefix or varlen_attention",
    shapes=("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b"),
    tokens=(1024, 4096, 16384),
    mode_tokens=4096,
    waterfall=("llama-3-8b", 4096),
    users=32,
    paper_mformer=True,
    card_shape="llama-3-8b",
    training="full",
    rounds_s=1.5,
    shares=_SHARES | {"kernels": 24, "step": 22, "waterfall": 14, "baselines": 12, "cards": 12, "training": 13},
)
ON_CPU = Settings(
    minutes=3.75,
    dtype="float32",
    copy_floats=2**24,
    matmul_size=1024,
    kernels="(forward+backward and (cpu-demo or cpu-16-shared or frozen-items-product)) or topk "
    "or (varlen_attention and amazon)",
    shapes=("llama-0.4m", "llama-1m", "llama-3m"),
    tokens=(256, 512, 1024),
    mode_tokens=512,
    waterfall=("llama-3m", 1024),
    users=8,
    paper_mformer=False,
    card_shape="llama-3-8b",
    training="reduced",
    rounds_s=0.5,
    shares=_SHARES | {"kernels": 14, "step": 10, "waterfall": 32, "baselines": 24, "cards": 6, "training": 20},
)
TINY = replace(  # for rehearsals and tests
    ON_CPU,
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
