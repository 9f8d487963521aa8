"""The whole configuration: what a Laser model is, and everything one training run depends on."""

from pydantic import model_validator

from laser_fast.config.language_model_sections import ExecutionConfig, LanguageModelConfig, PromptConfig
from laser_fast.config.recommender_sections import SplitConfig
from laser_fast.config.settings import Settings
from laser_fast.config.trained_sections import BiTuningConfig, MFormerConfig, TextConfig
from laser_fast.config.training_sections import EvaluationConfig, ObjectiveConfig, TrainingConfig


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
