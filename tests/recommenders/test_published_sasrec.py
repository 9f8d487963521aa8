"""RecBole's and LLaRA's SASRec against the published architectures written out for one sequence, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laser_fast.recommenders import SequentialRecommender
from laser_fast.recommenders.importers.weight_layouts import LAYOUTS
from laser_fast.recommenders.published_sasrec import ACTIVATIONS, LLaRASASRec, RecBoleSASRec

WIDTH, INNER, LENGTH, HEADS = 8, 12, 7, 2


def recbole_weights(num_items: int, layers: int = 2) -> dict[str, Tensor]:
    """Random weights under RecBole's names: a row for the padding in front."""
    shapes = {"item_embedding.weight": (num_items + 1, WIDTH), "position_embedding.weight": (LENGTH, WIDTH)}
    shapes |= {"LayerNorm.weight": (WIDTH,), "LayerNorm.bias": (WIDTH,)}
    for index in range(layers):
        for name, (rows, columns) in {
            "multi_head_attention.query": (WIDTH, WIDTH),
            "multi_head_attention.key": (WIDTH, WIDTH),
            "multi_head_attention.value": (WIDTH, WIDTH),
            "multi_head_attention.dense": (WIDTH, WIDTH),
            "multi_head_attention.LayerNorm": (WIDTH, 0),
            "feed_forward.dense_1": (INNER, WIDTH),
            "feed_forward.dense_2": (WIDTH, INNER),
            "feed_forward.LayerNorm": (WIDTH, 0),
        }.items():
            shapes[f"trm_encoder.layer.{index}.{name}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"trm_encoder.layer.{index}.{name}.bias"] = (rows,)
    return _random(shapes)


def llara_weights(num_items: int) -> dict[str, Tensor]:
    """Random weights under LLaRA's names: a row for the padding at the end, convolutions over one place."""
    shapes: dict[str, tuple[int, ...]] = {"item_embeddings.weight": (num_items + 1, WIDTH)}
    shapes |= {"positional_embeddings.weight": (LENGTH, WIDTH), "s_fc.weight": (num_items, WIDTH)}
    shapes |= {"s_fc.bias": (num_items,)}
    for name in ("ln_1", "ln_2", "ln_3", "feed_forward.layer_norm"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for name in ("mh_attn.linear_q", "mh_attn.linear_k", "mh_attn.linear_v"):
        shapes |= {f"{name}.weight": (WIDTH, WIDTH), f"{name}.bias": (WIDTH,)}
    for name in ("feed_forward.w_1", "feed_forward.w_2"):
        shapes |= {f"{name}.weight": (WIDTH, WIDTH, 1), f"{name}.bias": (WIDTH,)}
    return _random(shapes)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax over the items up to its own, head by head: [L, width] each."""
    outputs = []
    for head in torch.arange(WIDTH).chunk(HEADS):
        scores = query[:, head] @ key[:, head].T * scale
        scores = scores + torch.full_like(scores, -1e9).triu(1)
        outputs.append(scores.softmax(dim=1) @ value[:, head])
    return torch.cat(outputs, dim=1)


def recbole_states(w: dict[str, Tensor], history: Tensor, activation: str = "gelu") -> Tensor:
    """Their model on one history of their indices: [L, width]."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm(w["item_embedding.weight"][history] + w["position_embedding.weight"][: len(history)], "LayerNorm")
    for index in range(2):
        attention, mlp = (f"trm_encoder.layer.{index}.{part}" for part in ("multi_head_attention", "feed_forward"))
        query, key, value = (affine(x, f"{attention}.{part}") for part in ("query", "key", "value"))
        attended = _attend(query, key, value, (WIDTH / HEADS) ** -0.5)
        x = norm(affine(attended, f"{attention}.dense") + x, f"{attention}.LayerNorm")
        inner = affine(x, f"{mlp}.dense_1")
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2 if activation == "gelu" else inner.clamp_min(0)
        x = norm(affine(inner, f"{mlp}.dense_2") + x, f"{mlp}.LayerNorm")
    return x


def llara_states(w: dict[str, Tensor], history: Tensor) -> Tensor:
    """Their model on one history of their indices: [L, width]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].reshape(-1, WIDTH).T + w[f"{name}.bias"]

    x = w["item_embeddings.weight"][history] + w["positional_embeddings.weight"][: len(history)]
    queries = norm(x, "ln_1")
    query = affine(queries, "mh_attn.linear_q")
    key, value = affine(x, "mh_attn.linear_k"), affine(x, "mh_attn.linear_v")
    x = norm(_attend(query, key, value, WIDTH**-0.5) + queries, "ln_2")
    x = norm(affine(affine(x, "feed_forward.w_1").relu(), "feed_forward.w_2") + x, "feed_forward.layer_norm")
    return norm(x, "ln_3")


def _packed(*histories: list[int]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([0, *(len(history) for history in histories)])
    return torch.tensor([item for history in histories for item in history]), lengths.cumsum(0).int()


HISTORIES = ([4, 1, 1, 0, 3, 2, 4], [], [2], [0, 4, 3])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_recbole_is_what_recbole_publishes(activation: str) -> None:
    weights = recbole_weights(5)
    layout = LAYOUTS["recbole-sasrec"](weights)
    settings = {**layout.sizes, "num_items": 5, "num_heads": HEADS, "activation": activation}
    model, problems = layout.build(weights, torch.arange(1, 6), settings)
    assert model is not None and problems == [] and isinstance(model, SequentialRecommender)
    model = model.double().eval()
    model.load_state_dict(
        {layout.names[name]: tensor for name, tensor in weights.items()}
        | {"item_embedding.weight": weights["item_embedding.weight"][1:]}
    )  # what was rounded to float32
    expected = [recbole_states(weights, torch.tensor(history) + 1, activation) for history in HISTORIES if history]
    states = model.states(*_packed(*HISTORIES))
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-10, atol=1e-10)
    scores = model.score(*_packed(*HISTORIES))
    last = torch.stack([states[-1] for states in expected]) @ weights["item_embedding.weight"][1:].T
    torch.testing.assert_close(scores[[0, 2, 3]], last, rtol=1e-10, atol=1e-10)
    assert scores[1].abs().max() == 0


def test_llara_is_what_llara_publishes() -> None:
    weights = llara_weights(5)
    layout = LAYOUTS["llara-sasrec"](weights)
    model, problems = layout.build(weights, torch.arange(5), {**layout.sizes, "num_items": 5, "num_heads": HEADS})
    assert model is not None and problems == [] and isinstance(model, SequentialRecommender)
    model = model.double().eval()
    exact = {
        layout.names[name]: tensor.squeeze(-1) if tensor.dim() == 3 else tensor for name, tensor in weights.items()
    }
    model.load_state_dict(exact | {"item_embedding.weight": weights["item_embeddings.weight"][:5]})
    expected = [llara_states(weights, torch.tensor(history)) for history in HISTORIES if history]
    states = model.states(*_packed(*HISTORIES))
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-10, atol=1e-10)
    last = torch.stack([states[-1] for states in expected]) @ weights["s_fc.weight"].T + weights["s_fc.bias"]
    scores = model.score(*_packed(*HISTORIES))
    torch.testing.assert_close(scores[[0, 2, 3]], last, rtol=1e-10, atol=1e-10)
    assert scores[1].abs().max() == 0  # and not the bias: nothing is known of nobody


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="RecBoleSASRec: width must be a multiple of num_heads, got 8 and 3"):
        RecBoleSASRec(5, width=8, num_heads=3)
    with pytest.raises(ValueError, match="LLaRASASRec: width must be a multiple of num_heads, got 8 and 3"):
        LLaRASASRec(5, width=8, num_heads=3)
    with pytest.raises(ValueError, match="RecBoleSASRec: activation must be one of gelu, relu, .*, got 'mish'"):
        RecBoleSASRec(5, activation="mish")
    with pytest.raises(ValueError, match="LLaRASASRec: max_length must be at least 1, got 0"):
        LLaRASASRec(5, max_length=0)
    with pytest.raises(ValueError, match=r"RecBoleSASRec\.states: histories must have at most 3 items, got 4"):
        RecBoleSASRec(5, width=8, max_length=3).states(*_packed([0, 1, 2, 3]))
    assert set(ACTIVATIONS) == {"gelu", "relu", "swish", "tanh", "sigmoid"}
