"""Keys and values for every layer of the language model, made from few tokens (Li and Liang, arXiv:2101.00190)."""

import torch
from torch import Tensor, nn

from laser_fast.lm.key_value_prefix import KeyValuePrefix, LayerShape

DEEP_PREFIX_RANK = 64


class DeepPrefix(nn.Module):
    """Keys and values of every layer from the prefix tokens: `[K_l; V_l] = W_l (W_down p + b_down) + b_l`, low rank.

    (D + 1) r + (r + 1) sum_l 2 H_kv d parameters: 4.3 million for 32 layers of 8 heads of 128 at D = 768, r = 64.
    Keys are not rotated: a prefix has no order of its own, and the text behind it counts its positions from P.

    Args:
        width: D of the prefix tokens.
        layers: what the language model's attention layers take.
        rank: r.
        token_rms: root mean square of the tokens at the start.
    """

    def __init__(
        self, width: int, layers: list[LayerShape], *, rank: int = DEEP_PREFIX_RANK, token_rms: float = 1.0
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("DeepPrefix: layers must name at least one attention layer, got none")
        self.layers = layers
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, sum(2 * layer.width for layer in layers))
        nn.init.normal_(self.down.weight, std=width**-0.5 / token_rms)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        with torch.no_grad():  # tokens start as keys and values of the model's own size
            for rows, layer in zip(self.up.weight.split([2 * layer.width for layer in layers]), layers, strict=True):
                rows[: layer.width].normal_(std=layer.key_rms * rank**-0.5)
                rows[layer.width :].normal_(std=layer.value_rms * rank**-0.5)

    def forward(self, tokens: Tensor) -> KeyValuePrefix:
        """[B, P, D] (or [1, P, D], shared) -> keys and values of every layer, in the dtype of `tokens`."""
        written = self.up(self.down(tokens)).split([2 * layer.width for layer in self.layers], dim=-1)
        halves = [
            both.unflatten(-1, (2, layer.num_heads, layer.head_size)).unbind(2)
            for both, layer in zip(written, self.layers, strict=True)
        ]
        return KeyValuePrefix(tuple(key for key, _ in halves), tuple(value for _, value in halves))
