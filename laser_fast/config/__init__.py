"""Every setting, typed and validated in one place; read from YAML, overridden from the command line."""

from laser_fast.config.schema import (
    BiTuningConfig,
    EvaluationConfig,
    ExecutionConfig,
    LanguageModelConfig,
    LaserConfig,
    MFormerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptConfig,
    RecommenderConfig,
    SplitConfig,
    StageConfig,
    TextConfig,
    TrainingConfig,
)
from laser_fast.config.settings import Settings, apply_overrides, build_config, dump_config, load_config, resolve_path

__all__ = [
    "BiTuningConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "LanguageModelConfig",
    "LaserConfig",
    "MFormerConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PromptConfig",
    "RecommenderConfig",
    "Settings",
    "SplitConfig",
    "StageConfig",
    "TextConfig",
    "TrainingConfig",
    "apply_overrides",
    "build_config",
    "dump_config",
    "load_config",
    "resolve_path",
]
