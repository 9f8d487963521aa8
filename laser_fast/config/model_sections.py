"""What a Laser model is: the frozen language model, the prompt, what is trained around them, and its losses."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from laser_fast.config.bounds import Few, Fraction, Length, Temperature, Weight, Width
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
    """Where the token embeddings lie. "cpu" frees their bytes on the GPU and copies the rows that are looked up."""


class ExecutionConfig(Settings):
    """How the language model runs a training step: the same numbers for less memory or less time."""

    checkpointing: Literal["none", "mlp", "full", "offload"] = "none"
    """What backward computes again: nothing; the inner activations of every MLP; every layer from its input; the same
    with those inputs kept in host memory."""
    checkpoint_mformer: bool = False
    """Compute M-Former's layers again too. At the paper's size they keep more than a checkpointed LLM."""
    fused: bool = True
    """RMSNorm, gated MLPs and rotation that keep only what backward needs; on a GPU by Triton kernels."""
    share_dequantization: bool = True
    """Unpack 4-bit weights once for the recomputation and the backward of a layer, not twice."""
    last_layer: Literal["readout", "all"] = "readout"
    """Positions that the last layer computes past its keys and values."""


class PromptConfig(Settings):
    """How histories and items become text."""

    user_template: str = "Interaction history, newest first: {history}"
    item_template: str = "{title}"
    """Text of an item, over the text fields of the item table."""
    order: Literal["prefix-first", "prompt-first"] = "prefix-first"
    """Whether the words before the items follow the prefix (the paper) or stand in front of it."""
    reuse_instruction: bool = True
    """With "prompt-first": compute the keys and values of those words once, not with every sequence. Exact for a
    causal language model; a bidirectional one needs `false`."""
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


class MFormerConfig(Settings):
    """M-Former: router, query experts and one shared querying transformer (Laser, section 3.2).

    The default sizes are those of the study in docs/what-decides-the-ranking.md; the paper's are in presets/paper.yaml.
    """

    width: Width = 128
    num_layers: Few = 2
    """Layers of the querying transformer; every second one, the first included, reads the history."""
    num_heads: Few = 4
    num_experts: Few = 4
    top_k: Few = 2
    num_queries: Few = 4
    """Query tokens of an expert, and so prefix tokens."""
    weighting: Literal["softmax", "renormalize"] = "softmax"
    dropout: Fraction = 0.1
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the transformer's products; routing is always float32. "auto": bfloat16 on a GPU that has it."""
    max_history: Length = 20
    """Newest history items whose states are read."""
    states: Literal["auto", "cross-fitted", "in-sample"] = "auto"
    """Which states training rows are read with: those of the recommender's fold that has not seen the row's user
    ("auto" where there are folds), or those of the whole recommender, which has seen the row's target."""
    initialize_from: str | None = None
    """BERT checkpoint of this width, heads and at least this depth, whose layers the transformer begins with."""

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
    """Who writes the prefix of `mformer.num_queries` tokens: M-Former per user, a linear map of the recommender's
    newest state per user, one learned matrix for everybody, nobody."""
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
    """Of the read-out, before the head."""

    @property
    def reads_states(self) -> bool:
        """Whether the prefix is written from the states of a recommender."""
        return self.prefix in ("mformer", "linear")


class TextConfig(Settings):
    """The text residual: frozen text vectors of the items beside what the language model reads out."""

    residual: bool = True
    """Add them to the embeddings of users and items, through a head that starts as the identity; off = the paper."""
    item_side: Literal["auto", "lm", "text"] = "auto"
    """"lm": an item is the language model's read-out and the text vector; "text": the text vector alone, which needs no
    pass over the catalogue at every step. "auto": "text" with the residual, else "lm"."""
    templates: list[str] = Field(default_factory=list, max_length=64)
    """Templates over the text fields whose unit vectors are averaged; none = `prompt.item_template` alone."""
    max_tokens: Length = 96
    """Tokens of a text that is read for its vector."""
    max_history: Length = 10
    """Newest history items whose vectors make up the user's, with a learned weight for each age."""
    dropout: Fraction = 0.2
    """Of the user's and the item's vector, before the head."""
    initialize_from: str | None = None
    """Saved Laser, or run, on the same catalogue, whose vectors and trained residual this one begins with."""

    @property
    def items_are_texts(self) -> bool:
        """Whether item embeddings come from the text residual alone."""
        return self.residual and self.item_side != "lm"


class ObjectiveConfig(Settings):
    """Losses of both stages."""

    temperature: Temperature = 0.05
    balance_weight: Weight = 0.01
    """Weight `alpha` of the load-balancing loss."""
    balance_scope: Literal["global", "micro"] = "global"
    """Whose load is balanced when several processes train: that of all together, or each its own."""
    candidates: Literal["catalog", "sampled"] = "catalog"
    """What a user's target stands against: the whole item matrix, or `num_negatives` drawn items (the authors)."""
    num_negatives: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Items drawn for every user of a batch, uniformly among those outside its history."""
    mask_history: bool = True
    """Leave the items of a history out of the softmax: what a repeat is worth is then for the calibrated score to say,
    and embeddings need not push away what is most alike. Off = the paper, and the default with sampled candidates."""
    popularity: bool = True
    """Add p log(1 + count), p trained, to the scores in training, so that embeddings need not hold what every user's
    ranking begins with; the calibrated score has its own. Off = the paper, and the default with sampled candidates."""
    item_gradient: Literal["positives", "none"] = "positives"
    """Phase A: encode the positives and drawn negatives of a batch with gradient, as candidates of each other."""
    contrastive_weight: Weight = 1.0
    """Weight of stage 1's contrastive term; 0 switches it off, as for the next two."""
    matching_weight: Weight = 1.0
    """Queries that read a user and a text together tell whether they belong together."""
    generation_weight: Weight = 1.0
    """The text is foretold token by token from the queries."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_catalogue(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("candidates") == "sampled":
            return {"mask_history": False, "popularity": False} | values
        return values

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if self.candidates == "sampled" and (self.mask_history or self.popularity):
            raise ValueError(
                'mask_history and popularity must be false when candidates is "sampled" (they are of the whole '
                f"catalogue), got {self.mask_history} and {self.popularity}"
            )
        if self.candidates == "sampled" and not self.num_negatives:
            raise ValueError('num_negatives must be at least 1 when candidates is "sampled", got 0')
        return self


class ModelConfig(Settings):
    """What a Laser model is, whatever language model it runs and whatever it is trained on."""

    execution: ExecutionConfig = ExecutionConfig()
    prompt: PromptConfig = PromptConfig()
    mformer: MFormerConfig = MFormerConfig()
    bituning: BiTuningConfig = BiTuningConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _check_model(self) -> "ModelConfig":
        if self.text.item_side == "text" and not self.text.residual:
            raise ValueError('text.item_side must be "lm" or "auto" when text.residual is false, got "text"')
        deep = self.bituning.prefix_mode == "kv"
        if deep and self.bituning.prefix == "none":
            raise ValueError('bituning.prefix_mode must be "embedding" when bituning.prefix is "none", got "kv"')
        if deep and self.prompt.order == "prompt-first" and not self.prompt.reuse_instruction:
            raise ValueError(
                'prompt.reuse_instruction must be true with prompt.order "prompt-first" and bituning.prefix_mode '
                '"kv" (the prefix follows the instruction\'s keys and values), got false'
            )
        return self
