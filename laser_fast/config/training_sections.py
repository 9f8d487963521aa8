"""Settings of training and evaluation: losses, optimizers, stages, and the terms of the calibrated score."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from laser_fast.config.bounds import (
    Decay,
    Epochs,
    Fraction,
    Length,
    Many,
    Norm,
    Patience,
    Rate,
    Seed,
    Temperature,
    Weight,
)
from laser_fast.config.settings import Settings


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


class OptimizerConfig(Settings):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: Rate = 1e-3
    weight_decay: Decay = 0.01
    warmup_fraction: Fraction = 0.05
    max_grad_norm: Norm = 1.0
    eight_bit: bool = False
    """Moments of Adam in 8 bits, where bitsandbytes can: 2 bytes a trained parameter instead of 8."""


class RateConfig(Settings):
    """The learning rate of a stage whose optimizer is `training.optimizer` in all else."""

    learning_rate: Rate = 1e-3


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
    text_optimizer: RateConfig = RateConfig(learning_rate=2e-3)
    pretrain_optimizer: RateConfig = RateConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def rows_of_step(self, stage: StageConfig) -> int:
        """Rows of a step of a stage."""
        return stage.batch_size or self.batch_size

    def optimizer_at(self, rate: RateConfig) -> OptimizerConfig:
        """`optimizer` with the learning rate of another stage."""
        return self.optimizer.model_copy(update={"learning_rate": rate.learning_rate})


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
