"""The names and shapes of the weights that RecBole 1.2 and LLaRA save, beside the names here."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laser_fast.recommenders.gru4rec import GRU4Rec
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.published_sasrec import LLaRASASRec, RecBoleSASRec

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The checkpoints of one foreign model."""

    model: Callable[..., PackedRecommender]
    modules: Mapping[str, str]  # our name of a module, within its layer -> theirs, where they differ
    first_item: int  # 1 behind the padding, or 0 where the padding is behind the items
    sizes: Mapping[str, tuple[str, int]]  # setting -> (our name of a tensor, dimension of this size)
    asked: Mapping[str, tuple[str, Any]]  # setting -> (RecBole's name, published default; None where there is none)
    layer: str | None = None  # pattern of their names of a layer's tensors, whose group is its number
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that all these checkpoints have

    def num_items(self, weights: Weights) -> int:
        """Items of the checkpoint, without the padding; below 1 where it has no item table."""
        return self._size(weights, "item_embedding.weight", 0) - 1

    def settings(self, weights: Weights) -> dict[str, Any]:
        """Settings that names and shapes tell; 0 for the size of a missing tensor."""
        sizes = {setting: self._size(weights, *place) for setting, place in self.sizes.items()}
        return sizes | self._num_layers(weights) | dict(self.fixed)

    def names(self, weights: Weights) -> dict[str, str]:
        """Their name of every tensor of such a checkpoint -> ours."""
        with torch.device("meta"):
            model = self.model(**self._num_layers(weights), **self.fixed, num_items=1)
        return {self._theirs(ours): ours for ours in model.state_dict()}

    def _num_layers(self, weights: Weights) -> dict[str, int]:
        if self.layer is None:
            return {}
        found = [int(match[1]) for name in weights if (match := re.match(self.layer, name))]
        return {"num_layers": min(1 + max(found, default=0), 1 + len(weights))}  # a large number takes time to build

    def _size(self, weights: Weights, ours: str, dimension: int) -> int:
        tensor = weights.get(self._theirs(ours))
        return 0 if tensor is None or tensor.dim() <= dimension else tensor.shape[dimension]

    def _theirs(self, ours: str) -> str:
        stack, layer, module, parameter = re.fullmatch(r"(layers\.(\d+)\.)?(.+)\.(\w+)", ours).groups()  # type: ignore[union-attr]
        prefix = f"trm_encoder.layer.{layer}." if stack else ""
        return f"{prefix}{self.modules.get(module, module)}.{parameter}"


_ATTENTION = ("query", "key", "value")
_WIDTH, _LENGTH = ("item_embedding.weight", 1), ("position_embedding.weight", 0)

# what can be imported, by kind
LAYOUTS: dict[str, Layout] = {
    "recbole-sasrec": Layout(
        RecBoleSASRec,
        modules={
            **{f"attention.{part}": f"multi_head_attention.{part}" for part in _ATTENTION},
            "out": "multi_head_attention.dense",
            "attention_norm": "multi_head_attention.LayerNorm",
            "up": "feed_forward.dense_1",
            "down": "feed_forward.dense_2",
            "mlp_norm": "feed_forward.LayerNorm",
            "norm": "LayerNorm",
        },
        first_item=1,
        sizes={"width": _WIDTH, "inner_width": ("layers.0.up.weight", 0), "max_length": _LENGTH},
        asked={
            "num_heads": ("n_heads", None),
            "activation": ("hidden_act", "gelu"),
            "norm_eps": ("layer_norm_eps", 1e-12),
        },
        layer=r"trm_encoder\.layer\.(\d+)\.",
    ),
    "recbole-gru4rec": Layout(
        GRU4Rec,
        modules={"gru": "gru_layers"},
        first_item=1,
        sizes={"width": _WIDTH, "hidden_width": ("dense.weight", 1)},
        asked={"max_length": ("MAX_ITEM_LIST_LENGTH", 50)},
        layer=r"gru_layers\.weight_ih_l(\d+)$",
        fixed={"bias": False},
    ),
    "llara-sasrec": Layout(
        LLaRASASRec,
        modules={
            "item_embedding": "item_embeddings",
            "position_embedding": "positional_embeddings",
            "output": "s_fc",
            "query_norm": "ln_1",
            "mlp_input_norm": "ln_2",
            "norm": "ln_3",
            **{f"attention.{part}": f"mh_attn.linear_{part[0]}" for part in _ATTENTION},
            "up": "feed_forward.w_1",
            "down": "feed_forward.w_2",
            "mlp_norm": "feed_forward.layer_norm",
        },
        first_item=0,
        sizes={"width": _WIDTH, "max_length": _LENGTH},
        asked={"num_heads": ("num_heads", None)},
    ),
}
