"""`laser.json`: what a saved Laser is, which language model it belongs to, and how large its tensors must be."""

from typing import Annotated, Any, Literal

from pydantic import Field

from laser_fast.config import LanguageModelConfig, LaserConfig, ModelConfig
from laser_fast.files.descriptions import Description
from laser_fast.files.tensors import Shape
from laser_fast.nn.prefixes import DEEP_PREFIX_RANK

Size = Annotated[int, Field(ge=1)]


class BaseRecord(Description):
    """What `describe_base` says of the language model and the tokenizer."""

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
    saved: bool  # whether it lies in the folder
    sha256: str | None  # of its weights


class TableRecord(Description):
    """Settings of rules or neighbours, see `ItemToItem`."""

    decay: Annotated[float, Field(ge=0, le=1)]
    max_history: Size


class CalibrationRecord(Description):
    """`Calibration`: all of its scalars, and finite."""

    weights: dict[str, float]
    standardize: tuple[str, ...]
    history_bias: float
    last_bias: float
    popularity_weight: float


class LaserDescription(Description):
    """What `laser.json` holds."""

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
    config: LaserConfig | None  # of the run that wrote it; None for a model that was saved on its own
    facts: dict[str, Any]  # stage, epoch, metrics: the model does not depend on them

    def item_shapes(self, rows: int) -> dict[str, Shape]:
        """Of the tensors in items.safetensors; `rows` of the item matrix are 0 where it was saved before it had one."""
        items, width = self.num_items, self.base.hidden_size
        shapes: dict[str, Shape] = {"item_matrix": (rows, width), "counts": (items,)}
        return shapes | ({"text_vectors": (items, width)} if self.model.text.residual else {})

    def adapter_shapes(self) -> dict[str, Shape]:
        """Of those tensors in adapter.safetensors that show every size of the settings by which others grow."""
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
