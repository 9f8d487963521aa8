"""Weights as RecBole and LLaRA name and shape them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

WIDTH, INNER, LENGTH, HIDDEN, NUM_ITEMS = 8, 12, 7, 3, 5


@pytest.fixture(scope="session")
def foreign_weights() -> Callable[..., dict[str, Tensor]]:
    """`foreign_weights(kind, layers=1)`: random float64 weights of five items under the names of `kind`."""

    def weights(kind: str, layers: int = 1) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {}
        affine: dict[str, tuple[int, ...]] = {}
        square, norm = (WIDTH, WIDTH), (WIDTH,)
        if kind == "recbole-sasrec":
            shapes = {"item_embedding.weight": (NUM_ITEMS + 1, WIDTH), "position_embedding.weight": (LENGTH, WIDTH)}
            affine = {"LayerNorm": norm}
            for index in range(layers):
                attention, mlp = (f"trm_encoder.layer.{index}.{x}" for x in ("multi_head_attention", "feed_forward"))
                affine |= {f"{attention}.{name}": square for name in ("query", "key", "value", "dense")}
                affine |= {f"{mlp}.dense_1": (INNER, WIDTH), f"{mlp}.dense_2": (WIDTH, INNER)}
                affine |= {f"{attention}.LayerNorm": norm, f"{mlp}.LayerNorm": norm}
        elif kind == "recbole-gru4rec":
            shapes = {"item_embedding.weight": (NUM_ITEMS + 1, WIDTH)}
            shapes |= {"gru_layers.weight_ih_l0": (3 * HIDDEN, WIDTH), "gru_layers.weight_hh_l0": (3 * HIDDEN, HIDDEN)}
            affine = {"dense": (WIDTH, HIDDEN)}
        else:
            shapes = {"item_embeddings.weight": (NUM_ITEMS + 1, WIDTH), "positional_embeddings.weight": (LENGTH, WIDTH)}
            affine = {f"mh_attn.linear_{name}": square for name in "qkv"} | {"s_fc": (NUM_ITEMS, WIDTH)}
            affine |= dict.fromkeys(("feed_forward.w_1", "feed_forward.w_2"), (WIDTH, WIDTH, 1))
            affine |= dict.fromkeys(("ln_1", "ln_2", "ln_3", "feed_forward.layer_norm"), norm)
        for name, shape in affine.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    return weights
