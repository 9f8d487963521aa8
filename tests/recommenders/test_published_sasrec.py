"""RecBole's and LLaRA's SASRec against the published architectures written out for one sequence, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.data import ItemTable
from laser_fast.recommenders import SequentialRecommender
from laser_fast.recommenders.importers.checkpoints import import_recommender
from laser_fast.recommenders.importers.weight_layouts import LAYOUTS
from laser_fast.recommenders.published_sasrec import ACTIVATIONS, LLaRASASRec, RecBoleSASRec

WIDTH, HEADS = 8, 2
HISTORIES = ([4, 1, 1, 0, 3, 2, 4], [], [2], [0, 4, 3])


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax over the items up to its own, head by head: [L, width] each."""
    outputs = []
    for head in torch.arange(WIDTH).chunk(HEADS):
        scores = query[:, head] @ key[:, head].T * scale
        scores = scores + torch.full_like(scores, -1e9).triu(1)
        outputs.append(scores.softmax(dim=1) @ value[:, head])
    return torch.cat(outputs, dim=1)


class _Written:
    """Layers by their names in a checkpoint."""

    def __init__(self, weights: dict[str, Tensor], eps: float) -> None:
        self.weights, self.eps = weights, eps

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]


def recbole_states(weights: dict[str, Tensor], history: Tensor, activation: str = "gelu") -> Tensor:
    """Their model on one history of their indices: [L, width]."""
    written = _Written(weights, 1e-12)
    norm, affine = written.norm, written.affine
    x = weights["item_embedding.weight"][history] + weights["position_embedding.weight"][: len(history)]
    x = norm(x, "LayerNorm")
    for index in range(2):
        attention, mlp = (f"trm_encoder.layer.{index}.{part}" for part in ("multi_head_attention", "feed_forward"))
        query, key, value = (affine(x, f"{attention}.{part}") for part in ("query", "key", "value"))
        attended = _attend(query, key, value, (WIDTH / HEADS) ** -0.5)
        x = norm(affine(attended, f"{attention}.dense") + x, f"{attention}.LayerNorm")
        inner = affine(x, f"{mlp}.dense_1")
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2 if activation == "gelu" else inner.clamp_min(0)
        x = norm(affine(inner, f"{mlp}.dense_2") + x, f"{mlp}.LayerNorm")
    return x


def llara_states(weights: dict[str, Tensor], history: Tensor) -> Tensor:
    """Their model on one history of their indices: [L, width]."""
    written = _Written(weights, 1e-5)
    norm, affine = written.norm, written.affine
    x = weights["item_embeddings.weight"][history] + weights["positional_embeddings.weight"][: len(history)]
    queries = norm(x, "ln_1")
    query, key, value = (affine(y, f"mh_attn.linear_{z}") for y, z in ((queries, "q"), (x, "k"), (x, "v")))
    x = norm(_attend(query, key, value, WIDTH**-0.5) + queries, "ln_2")
    x = norm(affine(affine(x, "feed_forward.w_1").relu(), "feed_forward.w_2") + x, "feed_forward.layer_norm")
    return norm(x, "ln_3")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("recbole-sasrec", {"activation": "gelu"}), ("recbole-sasrec", {"activation": "relu"}), ("llara-sasrec", {})],
    ids=["recbole-gelu", "recbole-relu", "llara"],
)
def test_the_models_are_what_is_published(
    kind: str, settings: dict[str, Any], pack: Callable[..., Any], foreign_weights: Callable[..., Any], tmp_path: Path
) -> None:
    weights, first = foreign_weights(kind, 2), LAYOUTS[kind].first_item
    torch.save(weights, tmp_path / "w.pt")
    items = ItemTable(list("abcde"))
    model, _ = import_recommender(tmp_path / "w.pt", kind, items, same_order=True, num_heads=HEADS, **settings)
    assert isinstance(model, SequentialRecommender)
    exact = {ours: weights[theirs] for theirs, ours in LAYOUTS[kind].names(weights).items()}
    exact = {name: tensor.squeeze(-1) if tensor.dim() == 3 else tensor for name, tensor in exact.items()}
    embeddings = exact["item_embedding.weight"][first : first + 5]
    model = model.double()
    model.load_state_dict(exact | {"item_embedding.weight": embeddings})  # what was rounded to float32
    written = recbole_states if kind == "recbole-sasrec" else llara_states
    expected = [written(weights, torch.tensor(history) + first, **settings) for history in HISTORIES if history]
    torch.testing.assert_close(model.states(*pack(*HISTORIES)), torch.cat(expected), rtol=1e-10, atol=1e-10)
    output, bias = (embeddings, 0.0) if kind == "recbole-sasrec" else (weights["s_fc.weight"], weights["s_fc.bias"])
    scores = model.score(*pack(*HISTORIES))
    last = torch.stack([states[-1] for states in expected]) @ output.T + bias
    torch.testing.assert_close(scores[[0, 2, 3]], last, rtol=1e-10, atol=1e-10)
    assert scores[1].abs().max() == 0  # and not the bias: nothing is known of nobody


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="LLaRASASRec: width must be a multiple of num_heads, got 8 and 3"):
        LLaRASASRec(5, width=8, num_heads=3)
    with pytest.raises(ValueError, match="RecBoleSASRec: activation must be one of gelu, relu, .*, got 'mish'"):
        RecBoleSASRec(5, activation="mish")
    assert set(ACTIVATIONS) == {"gelu", "relu", "swish", "tanh", "sigmoid"}
