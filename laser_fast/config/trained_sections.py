"""Settings of what is trained around the language model: M-Former, Bi-Tuning and the text residual."""

from typing import Literal

from pydantic import Field, model_validator

from laser_fast.config.bounds import Few, Fraction, Length, Width
from laser_fast.config.settings import Settings


class MFormerConfig(Settings):
    """M-Former: router, query experts and one shared querying transformer (algorithm: Laser, section 3.2).

    The default sizes are those of the study in docs/what-decides-the-ranking.md; the paper's are in presets/paper.yaml.
    """

    width: Width = 128
    num_layers: Few = 2
    """Layers of the querying transformer; every second one, the first included, reads the history."""
    num_heads: Few = 4
    num_experts: Few = 4
    top_k: Few = 2
    num_queries: Few = 4
    """Query tokens per expert, which is also the number of prefix tokens."""
    weighting: Literal["softmax", "renormalize"] = "softmax"
    dropout: Fraction = 0.1
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the products in the querying transformer; routing is always float32. "auto": bfloat16 on a GPU that has
    it."""
    max_history: Length = 20
    """Newest history items whose states are read."""
    states: Literal["auto", "cross-fitted", "in-sample"] = "auto"
    """Which states training rows are read with: those of the recommender's fold that has not seen the row's user, or
    those of the whole recommender, which has seen the row's target. "auto": of the folds where there are any. Histories
    that are not trained on are read with the whole recommender."""
    initialize_from: str | None = None
    """Folder with a BERT checkpoint of this width, heads and at least this depth, whose layers the querying
    transformer begins with; None = random."""

    @model_validator(mode="after")
    def _check(self) -> "MFormerConfig":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts, got {self.top_k} and {self.num_experts}")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        return self


class BiTuningConfig(Settings):
    """Trainable virtual tokens around the text, and how the embedding is read out."""

    prefix: Literal["mformer", "linear", "shared", "none"] = "mformer"
    """Who writes the prefix: M-Former per user, a linear map of the recommender's newest state per user, one learned
    matrix for everybody, nobody. It has `mformer.num_queries` tokens, whoever writes it."""
    prefix_mode: Literal["embedding", "kv"] = "embedding"
    """How it enters: as input embeddings that run through the language model (the paper), or as keys and values of
    every layer (deep prompt tuning), which costs no token."""
    num_suffix_tokens: Few = 1
    readout: Literal["auto", "suffix", "mean"] = "auto"
    """"suffix": last hidden state at the suffix (the paper); "mean": mean over the text and the suffix, for encoders
    that were trained with mean pooling. "auto": "suffix" of a causal language model, "mean" of an encoder."""
    head: Literal["none", "linear"] = "linear"
    """"linear" is trained and starts as the identity."""
    dropout: Fraction = 0.1
    """Applies to the read-out, before the head."""

    @property
    def reads_states(self) -> bool:
        """Whether the prefix is written from the states of a recommender."""
        return self.prefix in ("mformer", "linear")


class TextConfig(Settings):
    """The text residual: frozen text vectors of the items beside what the language model reads out."""

    residual: bool = True
    """Add them to the embeddings of users and items, through a head that starts as the identity; off = the paper."""
    item_side: Literal["auto", "lm", "text"] = "auto"
    """Item embeddings with the residual: the language model's read-out and the text vector, or the text vector alone,
    which needs no pass over the catalogue and is trained against all of it at every step. "auto": "text" with the
    residual, "lm" without."""
    templates: list[str] = Field(default_factory=list, max_length=64)
    """Templates over the text fields whose unit vectors are averaged; none = `prompt.item_template` alone."""
    max_tokens: Length = 96
    """Tokens of a text that is read for its vector."""
    max_history: Length = 10
    """Newest history items whose vectors make up the user's, with a learned weight for each age."""
    dropout: Fraction = 0.2
    """Applies to the user's and the item's vector, before the head."""
    initialize_from: str | None = None
    """Folder of a saved Laser, or a run, on the same catalogue, whose vectors and trained residual this one begins
    with; None = vectors from the texts and a head that is the identity."""

    @property
    def items_are_texts(self) -> bool:
        """Whether item embeddings come from the text residual alone."""
        return self.residual and self.item_side != "lm"
