"""`laser.json`: what a saved Laser is, its language model, and the sizes of its tensors."""

from typing import Annotated, Any, Literal

from pydantic import Field

from laser_fast.config import LanguageModelConfig, LaserConfig, ModelConfig
from laser_fast.files.descriptions import Description
from laser_fast.files.tensors import Shape
from laser_fast.nn.prefixes import DEEP_PREFIX_RANK

Size = Annotated[int, Field(ge=1)]


class BaseRecord(Description):
    """The language model and the tokenizer, see `describe_base`."""

    type: str
    hidden_size: Size
    num_layers: Size | None
    vocab_size: Size
    causal: bool
    embeddings: list[float]
    vectors: list[float]
    tokenizer: str
    revision: str | None


class RecommenderRecord(Description):
    """The recommender that is read."""

    kind: str  # its class
    saved: bool  # in the folder
    sha256: str | None  # of its weights


class TableRecord(Description):
    """Settings of an `ItemToItem`."""

    decay: Annotated[float, Field(ge=0, le=1)]
    max_history: Size


class CalibrationRecord(Description):
    """A `Calibration`."""

    weights: dict[str, float]
    standardize: tuple[str, ...]
    history_bias: float
    last_bias: float
    popularity_weight: float


class LaserDescription(Description):
    """The content of `laser.json`."""

    format: int
    model: ModelConfig
    lm: LanguageModelConfig  # where the language model was, and how it was loaded
    base: BaseRecord
    num_items: Size
    item_map_hash: str
    split_hash: str | None
    recommender: RecommenderRecord | None
    calibration: CalibrationRecord | None
    tables: dict[Literal["rules", "neighbors"], TableRecord]
    config: LaserConfig | None  # of the run that wrote it, if any
    facts: dict[str, Any]  # stage, epoch, metrics

    def item_shapes(self, rows: int) -> dict[str, Shape]:
        """Shapes of the tensors in items.safetensors; an item matrix that was never made has 0 rows."""
        items, width = self.num_items, self.base.hidden_size
        shapes: dict[str, Shape] = {"item_matrix": (rows, width), "counts": (items,)}
        return shapes | ({"text_vectors": (items, width)} if self.model.text.residual else {})

    def adapter_shapes(self) -> dict[str, Shape]:
        """Shapes of those tensors in adapter.safetensors that reveal every size in the settings."""
        model, width = self.model, self.base.hidden_size
        mformer, bituning, tokens = model.mformer, model.bituning, model.mformer.num_queries
        shapes: dict[str, Shape] = {"bituning.suffix_tokens": (bituning.num_suffix_tokens, width)}
        if bituning.prefix == "shared":
            shapes["bituning.prefix_tokens"] = (tokens, width)
        if bituning.prefix == "linear":
            shapes["linear_prefix.tokens"] = (tokens, width)
        if bituning.prefix == "mformer":
            shapes["mformer.query_experts"] = (mformer.num_experts, tokens, mformer.width)
            last = f"mformer.qformer.layers.{mformer.num_layers - 1}.self_attention.out.weight"
            shapes[last] = (mformer.width, mformer.width)
        if bituning.prefix_mode == "kv":
            inner = mformer.width if bituning.prefix == "mformer" else width
            shapes["deep_prefix.down.weight"] = (DEEP_PREFIX_RANK, inner)
        if bituning.head == "linear":
            shapes["head.weight"] = (width, width)
        if model.text.residual:
            shapes["text.recency"] = (model.text.max_history,)
        return shapes
