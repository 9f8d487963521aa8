"""Every setting, typed and validated in one place; read from YAML, overridden from the command line.

A configuration that exists is valid: an unknown key, a value out of range or two settings that contradict each other
are refused when the file is read. Modules never receive these objects; builders unpack them.
"""

from laser_fast.config.model_sections import (
    BiTuningConfig,
    ExecutionConfig,
    LanguageModelConfig,
    MFormerConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptConfig,
    TextConfig,
)
from laser_fast.config.recommender_config import RecommenderConfig, SplitConfig
from laser_fast.config.settings import Settings, apply_overrides, build_config, dump_config, load_config, resolve_path
from laser_fast.config.training_sections import (
    EvaluationConfig,
    LaserConfig,
    OptimizerConfig,
    RateConfig,
    StageConfig,
    TrainingConfig,
)

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
    "RateConfig",
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
