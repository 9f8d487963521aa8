"""What one training run depends on: a model, its data and split, the schedule, and the score that is calibrated."""

from typing import Literal

from pydantic import model_validator

from laser_fast.config.bounds import Decay, Epochs, Fraction, Length, Many, Norm, Patience, Rate, Seed
from laser_fast.config.model_sections import LanguageModelConfig, ModelConfig
from laser_fast.config.recommender_config import SplitConfig
from laser_fast.config.settings import Settings


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
    """Training rows drawn for an epoch; None = all."""
    batch_size: Length | None = None
    """Rows of a step in this stage; None = `training.batch_size`."""
    patience: Patience = 3
    """Epochs without a better validation NDCG@10 before it stops."""


class TrainingConfig(Settings):
    """The schedule: the text residual, stage 1 (pre-training of M-Former), stage 2 in its phases A and B."""

    seed: Seed = 0
    batch_size: Length = 64
    """Rows of a step; several processes take an equal share each."""
    micro_batch_tokens: Many | None = None
    """Packed tokens, virtual ones included, that go through the language model at once; a batch of more is split and
    its gradients added up. None = never split."""
    halve_on_oom: bool = False
    """When memory runs out, halve `micro_batch_tokens` and take the step again instead of stopping."""
    save_steps: Many | None = None
    """Steps between two states from which `train --resume` goes on; None = one at every epoch's end only."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tensorboard: bool = False
    """Also write the curves for TensorBoard, into `output`/tensorboard; needs the package `tensorboard`."""
    text: StageConfig = StageConfig(epochs=10, batch_size=256)
    """With `text.residual`: the residual alone, without the language model."""
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
    """Fit the calibrated score (repeat, popularity, recommender terms) on validation; off = the cosine of the paper.
    The next three settings say what it may add."""
    recommender_score: bool = True
    """The recommender's own score, z-scored per history."""
    sequential_rules: bool = True
    """How often items followed one another, or themselves, in the training part (`SequentialRules`)."""
    neighbors: bool = True
    """How often items belong to the same histories (`ItemKNN`)."""


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
        epochs, objective = self.training.pretrain.epochs, self.objective
        if epochs and self.bituning.prefix != "mformer":
            raise ValueError(
                'training.pretrain.epochs must be 0 when bituning.prefix is not "mformer" (stage 1 trains M-Former), '
                f"got {epochs}"
            )
        if epochs and not (objective.contrastive_weight or objective.matching_weight or objective.generation_weight):
            raise ValueError(
                "objective.contrastive_weight, matching_weight or generation_weight must be above 0 when "
                f"training.pretrain.epochs is, got 0 for all and {epochs} epochs"
            )
        return self
