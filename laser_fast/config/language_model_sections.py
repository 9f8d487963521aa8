"""Settings of the frozen language model: which one, how it runs a step, and the text it reads."""

from typing import Literal

from pydantic import model_validator

from laser_fast.config.bounds import Length
from laser_fast.config.settings import Settings


class LanguageModelConfig(Settings):
    """The frozen language model."""

    path: str
    """Folder with a Hugging Face model and tokenizer, `package:NAME/FOLDER` for one inside a Python package,
    `hub:OWNER/NAME[@REVISION]` for one of the Hugging Face Hub (downloaded at the first use), or `random:SHAPE` for
    random weights: a shape of `laser_fast/presets/shapes` or a folder with a config.json."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None = that of `path`. A random model needs one to read texts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights. "auto": bfloat16 on a GPU, float32 on a CPU."""
    quantization: Literal["none", "nf4"] = "none"
    """"nf4": linear layers in 4 bits with double quantisation (bitsandbytes), computed in `dtype`. A folder that holds
    quantised weights already is loaded as it is."""
    embedding_device: Literal["model", "cpu"] = "model"
    """Where the table of token embeddings lies. "cpu" frees its bytes on the GPU; looked-up rows are copied there."""


class ExecutionConfig(Settings):
    """How the frozen language model runs a training step: the same numbers for less memory or less time."""

    checkpointing: Literal["none", "mlp", "full", "offload"] = "none"
    """What backward computes again instead of keeping: nothing; the inner activations of every MLP; every layer from
    its input; the same with those inputs kept in host memory."""
    checkpoint_mformer: bool = False
    """Compute the layers of M-Former again too. At the paper's size what they keep outweighs a checkpointed LLM."""
    fused: bool = True
    """RMSNorm, gated MLPs and rotation that keep only what backward needs; on a GPU by Triton kernels."""
    share_dequantization: bool = True
    """4-bit weights unpacked once for the recomputation and the backward of a layer, not twice."""
    last_layer: Literal["readout", "all"] = "readout"
    """The last layer past its keys and values: for the positions that are read out, or for all."""


class PromptConfig(Settings):
    """How histories and items become text."""

    user_template: str = "Interaction history, newest first: {history}"
    item_template: str = "{title}"
    """Text of an item, over the text fields of the item table."""
    order: Literal["prefix-first", "prompt-first"] = "prefix-first"
    """Whether the words before the items follow the prefix (the paper) or stand in front of it."""
    reuse_instruction: bool = True
    """With "prompt-first": compute the keys and values of those words once instead of with every sequence. Exact for
    a causal language model; a bidirectional one needs `false`."""
    separator: str = "; "
    newest_first: bool = True
    max_items: Length = 5
    """Newest history items that the language model reads; M-Former and the text residual read more at little cost."""
    max_item_tokens: Length = 32
    max_tokens: Length = 256
    """Item tokens of one history; the oldest items are dropped first."""

    @model_validator(mode="after")
    def _check(self) -> "PromptConfig":
        if self.user_template.count("{history}") != 1:
            raise ValueError(f"user_template must contain {{history}} once, got {self.user_template!r}")
        return self
