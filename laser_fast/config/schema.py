"""Every setting of laser_fast: typed, validated in one place, read from YAML, overridden from the command line.

The sections are frozen pydantic models, so a configuration that exists is valid: an unknown key, a value out of range
or two settings that contradict each other are refused when the file is read, with the name of the key and the nearest
known one. Modules never receive these objects; builders unpack them.

Every number has two bounds. The upper ones are far from what anybody trains with: they are there so that no typing
error (64e6 for 64) begins a loop without end or asks for memory that no machine has.
"""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from laser_fast.config.settings import Settings

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=2**14)]
"""Of a hidden state: a square matrix of the widest takes 1 GiB."""
Few = Annotated[int, Field(ge=1, le=1024)]
"""Layers, heads, experts and virtual tokens."""
Length = Annotated[int, Field(ge=1, le=2**20)]
"""Items or tokens of one sequence, and sequences of one batch."""
Many = Annotated[int, Field(ge=1, le=10**10)]
"""Rows, steps and packed tokens."""
Epochs = Annotated[int, Field(ge=0, le=10**5)]
Patience = Annotated[int, Field(ge=1, le=10**5)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy takes no larger one."""
Rate = Annotated[float, Field(gt=0.0, le=100.0)]
Decay = Annotated[float, Field(ge=0.0, le=100.0)]
Norm = Annotated[float, Field(gt=0.0, le=1e9)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Scores of unit vectors divided by it, and their exponentials' gradients, stay in float32."""
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
_LATEST = 2.0**63  # moments of a log, in whatever unit


class RecommenderConfig(Settings):
    """SASRec (Kang & McAuley, 2018) or GRU4Rec (Hidasi et al., 2016), the frozen ID-based recommender; its training."""

    kind: Literal["sasrec", "gru4rec"] = "sasrec"
    width: Width = 64
    """Width `D_id` of the item embeddings and of the states."""
    num_layers: Few = 2
    num_heads: Few = 2
    """Of SASRec; GRU4Rec has none."""
    hidden_width: Width | None = None
    """Of GRU4Rec's recurrent layers; None = 2 * `width`. SASRec has none."""
    dropout: Fraction = 0.5
    """Of the embeddings, attention weights and layer outputs."""
    state_dropout: Fraction = 0.2
    """Of the states before they meet the item embeddings: keeps small data sets from being learned by heart."""
    max_length: Length = 50
    """Newest history items that are read; older ones are dropped."""
    batch_size: Length = 128
    """Training sequences in a batch, each of up to `max_length` + 1 events; longer ones are cut into several."""
    learning_rate: Rate = 1e-3
    weight_decay: Decay = 0.0
    epochs: Annotated[int, Field(ge=1, le=10**5)] = 100
    patience: Patience = 8
    """Epochs without a better validation NDCG@10 before training stops."""
    folds: Annotated[int, Field(ge=0, le=127)] = 3
    """Models beside this one, each fitted without the users of its fold, whose states Laser's training rows are read
    with; 0 = none (the paper), else at least 2."""
    fold_items: Literal["aligned"] = "aligned"
    """Each fold learns its own item embeddings from the start this model had, and its states are rotated onto this
    model's."""

    @field_validator("folds")
    @classmethod
    def _several(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("must be 0 or at least 2 (one fold leaves no user to learn from), got 1")
        return folds


class LanguageModelConfig(Settings):
    """The frozen language model."""

    path: str
    """Folder with a Hugging Face model and tokenizer, `package:NAME/FOLDER` for one inside a Python package,
    `hub:OWNER/NAME[@REVISION]` for one of the Hugging Face Hub (downloaded at the first use), or `random:SHAPE` for
    random weights: a shape of `laser_fast/presets/shapes` or a folder with a config.json."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None = that of `path`. A random model needs one to read texts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights. "auto": bfloat16 on a GPU, float32 on a CPU."""
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
    """Over the text fields of the item table."""
    item_prompt: str = "{text}"
    """Words around the text of an item that is encoded on its own, as `user_template` has around a history."""
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
        if self.item_prompt.count("{text}") != 1:
            raise ValueError(f"item_prompt must contain {{text}} once, got {self.item_prompt!r}")
        return self


class MFormerConfig(Settings):
    """M-Former: router, query experts and one shared querying transformer (algorithm: Laser, section 3.2).

    The default sizes are those of the study in docs/what-decides-the-ranking.md; the paper's are in presets/paper.yaml.
    """

    width: Width = 128
    num_layers: Few = 2
    num_heads: Few = 4
    cross_attention_freq: Few = 2
    """Cross-attention to the history in every so-many-th layer, the first included."""
    num_experts: Few = 4
    top_k: Few = 2
    num_queries: Few = 4
    """Query tokens per expert, which is also the number of prefix tokens."""
    weighting: Literal["softmax", "renormalize"] = "softmax"
    dropout: Fraction = 0.1
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the products in the querying transformer; routing is float32 always. "auto": bfloat16 on a GPU that has it."""
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
    deep_prefix_rank: Width = 64
    """With "kv": rank of the map from prefix tokens to keys and values."""
    num_suffix_tokens: Few = 1
    readout: Literal["auto", "suffix", "mean"] = "auto"
    """"suffix": last hidden state at the suffix (the paper); "mean": mean over the text and the suffix, for encoders
    that were trained with mean pooling. "auto": "suffix" of a causal language model, "mean" of an encoder."""
    head: Literal["none", "linear"] = "linear"
    """"linear" is trained and starts as the identity."""
    dropout: Fraction = 0.1
    """On the read-out, before the head."""

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
    """Of a text that is read for its vector."""
    max_history: Length = 10
    """Newest history items whose vectors make up the user's, with a learned weight for each age."""
    dropout: Fraction = 0.2
    """On the user's and the item's vector, before the head."""
    initialize_from: str | None = None
    """Folder of a saved Laser, or a run, on the same catalogue, whose vectors and trained residual this one begins
    with; None = vectors from the texts and a head that is the identity."""

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
    """Whose load is balanced when several processes train: that of all of them together, or each its own."""
    candidates: Literal["catalog", "sampled"] = "catalog"
    """What a user's target stands against: the whole item matrix, or `num_negatives` drawn items (the authors)."""
    num_negatives: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Items drawn for every user of a batch, uniformly among those outside its history."""
    mask_history: bool = True
    """Leave the items of a history out of what its target stands against in V: what a repeat is worth is then for the
    calibrated score to say, and embeddings need not push away what is most alike. Off = the paper, and the default with
    sampled candidates."""
    popularity: bool = True
    """Add p log(1 + count) to the scores of V in training, p trained, so that embeddings need not hold what every
    user's ranking begins with; the calibrated score has its own. Off = the paper, and the default with sampled
    candidates."""
    item_gradient: Literal["positives", "none"] = "positives"
    """Phase A: whether the positives of a batch, and the drawn negatives, are encoded with gradient, as candidates of
    each other."""
    contrastive_weight: Weight = 1.0
    """Of stage 1's contrastive term; 0 switches it off, as for the next two."""
    matching_weight: Weight = 1.0
    """Queries that read a user and a text together tell whether they belong together."""
    generation_weight: Weight = 1.0
    """The text is foretold token by token from the queries."""
    contrastive_temperature: Temperature = 0.07
    """Initial value of the learned temperature of stage 1."""
    label_smoothing: Fraction = 0.1

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


class OptimizerConfig(Settings):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: Rate = 1e-3
    weight_decay: Decay = 0.01
    warmup_fraction: Fraction = 0.05
    max_grad_norm: Norm = 1.0
    eight_bit: bool = False
    """Moments of Adam in 8 bits, where bitsandbytes can: 2 bytes a trained parameter instead of 8."""


class StageConfig(Settings):
    """How long one stage or phase runs."""

    epochs: Epochs
    """0 skips it."""
    rows_per_epoch: Many | None = None
    """Training rows drawn for an epoch; None: all of them."""
    batch_size: Length | None = None
    """Rows of a step in this stage; None: `training.batch_size`."""
    patience: Patience = 3
    """Epochs without a better validation NDCG@10 before it stops."""


class TrainingConfig(Settings):
    """The schedule: stage 1 (pre-training of M-Former), then stage 2 in its phases A and B."""

    seed: Seed = 0
    batch_size: Length = 64
    """Rows of a step; where several processes train, of all of them together, each takes an equal share."""
    micro_batch_tokens: Many | None = None
    """Packed tokens, virtual ones included, that go through the language model at once; a batch of more is split and
    its gradients added up. None = never split."""
    halve_on_oom: bool = False
    """When memory runs out, halve `micro_batch_tokens` and take the step again instead of stopping."""
    save_steps: Many | None = None
    """Steps after which the state is saved, from which `train --resume` goes on. None = at every epoch's end only."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tensorboard: bool = False
    """Also write the curves for TensorBoard, into `output`/tensorboard; needs the package `tensorboard`."""
    text: StageConfig = StageConfig(epochs=10, batch_size=256)
    """Before all others, with `text.residual`: the residual alone, without the language model."""
    pretrain: StageConfig = StageConfig(epochs=0)
    phase_a: StageConfig = StageConfig(epochs=1)
    phase_b: StageConfig = StageConfig(epochs=0)
    text_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    pretrain_optimizer: OptimizerConfig = OptimizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def rows_of_step(self, stage: StageConfig) -> int:
        """Rows of a step of a stage."""
        return stage.batch_size or self.batch_size


class SplitConfig(Settings):
    """What is learned from and what is asked about; the recommender must have been trained on the same split."""

    kind: Literal["leave-one-out", "global-time", "by-user", "given"] = "leave-one-out"
    """"leave-one-out": every user's last two events are held out; "global-time": everything from a moment on;
    "by-user": some users altogether; "given": data that came split (`prepare --presplit`)."""
    valid_from: float | int | str | None = None
    """"global-time": where validation begins, as a number in the unit of the log or, where that is seconds, a date."""
    test_from: float | int | str | None = None
    """"global-time": where test begins. Without both moments the fractions decide."""
    valid_fraction: Fraction = 0.1
    """"global-time": share of the events; "by-user": share of the users."""
    test_fraction: Fraction = 0.1
    targets: Literal["first", "last", "all"] = "first"
    """"global-time": which of a user's events in a part are asked about."""
    seed: Seed = 0
    """"by-user": of the choice."""

    @field_validator("valid_from", "test_from", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not abs(value) < _LATEST:  # NaN too
            raise ValueError(f"must be a number of less than 2^63, or a date, got {value:.6g}")
        return value.isoformat() if isinstance(value, date) else value  # YAML reads 2024-01-31 as a date


class EvaluationConfig(Settings):
    """Full ranking over the whole catalogue."""

    batch_size: Length = 128
    calibrate: bool = True
    """Fit the calibrated score (repeat, popularity, recommender terms) on validation; off = the cosine of the paper."""
    recommender_score: bool = True
    """Let the calibrated score add the recommender's own, z-scored per history."""
    sequential_rules: bool = True
    """Count which items followed which in the training part, themselves included, and let the calibrated score add it
    (`SequentialRules`)."""
    neighbors: bool = True
    """Count which items belong to the same histories, and let the calibrated score add it (`ItemKNN`)."""


class ModelConfig(Settings):
    """What a Laser model is, whatever it is trained on."""

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
        if self.bituning.prefix == "none" and self.bituning.prefix_mode == "kv":
            raise ValueError('bituning.prefix_mode must be "embedding" when bituning.prefix is "none", got "kv"')
        behind_instruction = self.bituning.prefix_mode == "kv" and self.prompt.order == "prompt-first"
        if behind_instruction and not self.prompt.reuse_instruction:
            raise ValueError(
                'prompt.reuse_instruction must be true with prompt.order "prompt-first" and bituning.prefix_mode '
                '"kv" (the prefix follows the instruction\'s keys and values), got false'
            )
        return self


class LaserConfig(ModelConfig):
    """Everything one training run depends on."""

    data: str
    """Folder written by `laser-fast prepare`."""
    recommender: str | None = None
    """Folder written by `laser-fast recommender train`; needed when `bituning.prefix` is "mformer" or "linear"."""
    output: str
    """The run directory; must not exist yet, unless the run in it is resumed."""
    lm: LanguageModelConfig
    split: SplitConfig = SplitConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> "LaserConfig":
        if self.bituning.reads_states and self.recommender is None:
            raise ValueError(f'recommender must be set when bituning.prefix is "{self.bituning.prefix}", got None')
        if self.bituning.prefix != "mformer" and self.training.pretrain.epochs:
            raise ValueError(
                'training.pretrain.epochs must be 0 when bituning.prefix is not "mformer" (stage 1 trains M-Former), '
                f"got {self.training.pretrain.epochs}"
            )
        objective = self.objective
        terms = objective.contrastive_weight, objective.matching_weight, objective.generation_weight
        if self.training.pretrain.epochs and not any(terms):
            raise ValueError(
                "objective.contrastive_weight, matching_weight or generation_weight must be above 0 when "
                f"training.pretrain.epochs is, got 0 for all and {self.training.pretrain.epochs} epochs"
            )
        return self
