"""How RecBole 1.2 and LLaRA name and shape what they save, beside the names here."""

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
    """One foreign checkpoint, seen by its names and shapes.

    Attributes:
        model: what it becomes.
        names: their name of every tensor with ours.
        item_tables: their names of the tensors with a row for every item.
        num_items: items it knows, without the padding.
        first_item: index of the first one.
        padding: index of the padding.
        sizes: settings that its shapes tell.
        asked: setting -> (its name in RecBole's configuration, published default; None = it has to be told).
    """

    model: Callable[..., PackedRecommender]
    names: Mapping[str, str]
    item_tables: tuple[str, ...]
    num_items: int
    first_item: int
    padding: int
    sizes: Mapping[str, Any]
    asked: Mapping[str, tuple[str, Any]] = field(default_factory=dict)

    def key_problems(self, weights: Weights) -> list[str]:
        """Names that are missing or too many."""
        missing = sorted(self.names.keys() - weights.keys())
        unexpected = sorted(weights.keys() - self.names.keys())
        return ([f"missing keys {missing}"] if missing else []) + (
            [f"unexpected keys {unexpected}"] if unexpected else []
        )

    def settings(
        self, given: Mapping[str, Any], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str], list[str]]:
        """What the shapes, the caller and the file tell.

        Returns:
            (settings of the model without `num_items`, names of those that are published defaults, problems).
        """
        values, assumed, problems = dict(self.sizes), [], []
        for name, (their_name, default) in self.asked.items():
            told = config.get(their_name)
            if name in given and told is not None and given[name] != told:
                problems.append(f"{name} {given[name]} against {told} in the file")
            value = given.get(name, told)
            if value is None and default is None:
                problems.append(f"no {name}, which the weights do not tell")
            elif value is None:
                assumed.append(name)
            values[name] = default if value is None else value
        problems += [f"{name}, which it has no use for" for name in given if name not in self.asked]
        return values, assumed, problems

    def build(
        self, weights: Weights, rows: Tensor, settings: dict[str, Any]
    ) -> tuple[PackedRecommender | None, list[str]]:
        """The model with these weights, or what is wrong with shapes and values.

        Args:
            rows: int64 [I], see `foreign_checkpoints`.
        """
        with torch.random.fork_rng(devices=[]):  # the random weights are overwritten at once
            try:
                model = self.model(**settings)
            except (TypeError, ValueError) as error:
                return None, [str(error)]
        own, state, problems = model.state_dict(), {}, []
        for theirs, ours in self.names.items():
            tensor = weights[theirs]
            expected = self._expected(theirs, own[ours])
            if tensor.dim() == 3 and tensor.shape[2:] == (1,):  # a convolution over one place is a linear map
                tensor = tensor[:, :, 0]
            if tensor.shape != expected:
                problems.append(f"{theirs} of shape {tuple(weights[theirs].shape)} instead of {tuple(expected)}")
                continue
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                problems.append(f"{theirs} with values that are no finite floating-point numbers")
                continue
            state[ours] = (tensor[rows] if theirs in self.item_tables else tensor).float()
        if not problems:
            model.load_state_dict(state)
        return model, problems

    def _expected(self, theirs: str, own: Tensor) -> torch.Size:
        if theirs not in self.item_tables:
            return own.shape
        with_padding = theirs == self.item_tables[0]
        return torch.Size([self.num_items + with_padding, *own.shape[1:]])


def recbole_sasrec(weights: Weights) -> Layout:
    """SASRec of RecBole: index 0 is the padding."""
    depth = _count(weights, r"trm_encoder\.layer\.(\d+)\.")
    names = {"item_embedding.weight": "item_embedding.weight", "position_embedding.weight": "position_embedding.weight"}
    names |= _affine({"LayerNorm": "norm"})
    for index in range(depth):
        attention, mlp = (f"trm_encoder.layer.{index}.{part}" for part in ("multi_head_attention", "feed_forward"))
        ours = f"layers.{index}"
        names |= _affine({f"{attention}.{part}": f"{ours}.attention.{part}" for part in ("query", "key", "value")})
        names |= _affine({f"{attention}.dense": f"{ours}.out", f"{attention}.LayerNorm": f"{ours}.attention_norm"})
        names |= _affine({f"{mlp}.dense_1": f"{ours}.up", f"{mlp}.dense_2": f"{ours}.down"})
        names |= _affine({f"{mlp}.LayerNorm": f"{ours}.mlp_norm"})
    sizes = {
        "width": _size(weights, "item_embedding.weight", 1),
        "inner_width": _size(weights, "trm_encoder.layer.0.feed_forward.dense_1.weight", 0),
        "num_layers": depth,
        "max_length": _size(weights, "position_embedding.weight", 0),
    }
    asked = {
        "num_heads": ("n_heads", None),
        "activation": ("hidden_act", "gelu"),
        "norm_eps": ("layer_norm_eps", 1e-12),
    }
    table = "item_embedding.weight"
    return Layout(RecBoleSASRec, names, (table,), _size(weights, table, 0) - 1, 1, 0, sizes, asked)


def recbole_gru4rec(weights: Weights) -> Layout:
    """GRU4Rec of RecBole: index 0 is the padding; no biases in the recurrent layers."""
    depth = _count(weights, r"gru_layers\.weight_ih_l(\d+)$")
    names = {"item_embedding.weight": "item_embedding.weight", **_affine({"dense": "dense"})}
    for index in range(depth):
        names |= {f"gru_layers.weight_{part}_l{index}": f"gru.weight_{part}_l{index}" for part in ("ih", "hh")}
    sizes = {
        "width": _size(weights, "item_embedding.weight", 1),
        "hidden_width": _size(weights, "dense.weight", 1),
        "num_layers": depth,
        "bias": False,
    }
    asked = {"max_length": ("MAX_ITEM_LIST_LENGTH", 50)}
    table = "item_embedding.weight"
    return Layout(GRU4Rec, names, (table,), _size(weights, table, 0) - 1, 1, 0, sizes, asked)


def llara_sasrec(weights: Weights) -> Layout:
    """SASRec of LLaRA: items from 0, the padding behind them; an output layer with a row for every item."""
    names = {
        "item_embeddings.weight": "item_embedding.weight",
        "positional_embeddings.weight": "position_embedding.weight",
        **_affine({"ln_1": "query_norm", "ln_2": "mlp_input_norm", "ln_3": "norm"}),
        **_affine({f"mh_attn.linear_{part[0]}": f"attention.{part}" for part in ("query", "key", "value")}),
        **_affine({"feed_forward.w_1": "up", "feed_forward.w_2": "down", "feed_forward.layer_norm": "mlp_norm"}),
        **_affine({"s_fc": "output"}),
    }
    table = "item_embeddings.weight"
    sizes = {"width": _size(weights, table, 1), "max_length": _size(weights, "positional_embeddings.weight", 0)}
    count = _size(weights, table, 0) - 1
    tables = (table, "s_fc.weight", "s_fc.bias")
    return Layout(LLaRASASRec, names, tables, count, 0, count, sizes, {"num_heads": ("num_heads", None)})


LAYOUTS: dict[str, Callable[[Weights], Layout]] = {
    "recbole-sasrec": recbole_sasrec,
    "recbole-gru4rec": recbole_gru4rec,
    "llara-sasrec": llara_sasrec,
}
"""By kind."""


def _affine(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")}


def _size(weights: Weights, name: str, dimension: int) -> int:
    """0 where there is no such tensor; that is then told as a missing key."""
    tensor = weights.get(name)
    return 0 if tensor is None or tensor.dim() <= dimension else tensor.shape[dimension]


def _count(weights: Weights, pattern: str) -> int:
    """Layers there are: 1 + the largest number in names of this form, at least 1."""
    found = [int(match.group(1)) for name in weights if (match := re.match(pattern, name))]
    return 1 + max(found, default=0)
