"""Prefixes without query experts: an affine map to tokens, a low-rank map to keys and values of every layer."""

import torch
from torch import Tensor, nn

from laser_fast.lm.key_value_prefix import KeyValuePrefix, LayerShape

DEEP_PREFIX_RANK = 64  # r


class LinearPrefix(nn.Module):
    """A prefix from the state h of a user's newest item: `prefix = h W + C`, Q rows of width D_llm.

    The baseline of M-Former, as CoLLM (arXiv:2310.19488) and LLaRA (arXiv:2312.02445) map a collaborative embedding.

    Args:
        state_size: `D_id`, width of the recommender's states.
        lm_width: `D_llm`.
        num_tokens: Q.
        rms: scale of the random weights and tokens, that of the language model's token embeddings.
    """

    def __init__(self, state_size: int, lm_width: int, *, num_tokens: int, rms: float = 0.02) -> None:
        super().__init__()
        self.state_size = state_size
        self.num_tokens = num_tokens
        self.weight = nn.Parameter(torch.randn(state_size, num_tokens * lm_width) * rms * state_size**-0.5)
        self.tokens = nn.Parameter(torch.randn(num_tokens, lm_width) * rms)

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Prefix of every user: states [N, D_id], cu_seqlens int32 [B+1] -> [B, Q, D_llm]; no history gives C."""
        if states.dim() != 2 or states.shape[1] != self.state_size:
            raise ValueError(f"LinearPrefix: states must be [N, {self.state_size}], got {tuple(states.shape)}")
        from_one = torch.cat([states.new_zeros(1, self.state_size), states])  # row 0 is that of an empty history
        newest = from_one[torch.where(cu_seqlens.diff() > 0, cu_seqlens[1:], 0)]
        return (newest @ self.weight).view(-1, *self.tokens.shape) + self.tokens


class DeepPrefix(nn.Module):
    """Keys and values of every layer from the prefix tokens: `[K_l; V_l] = W_l (W_down p + b_down) + b_l`, low rank.

    It has (D + 1) r + (r + 1) sum_l 2 H_kv d parameters: 4.3 million for 32 layers of 8 heads of 128 at
    D = 768. Keys are not rotated: a prefix has no order, and the text behind it counts its positions from P.

    Args:
        width: D of the prefix tokens.
        layers: the language model's attention layers.
        token_rms: root mean square of the tokens before training.

    Source: Li and Liang, arXiv:2101.00190.
    """

    def __init__(self, width: int, layers: list[LayerShape], *, token_rms: float = 1.0) -> None:
        super().__init__()
        if not layers:
            raise ValueError("DeepPrefix: layers must name at least one attention layer, got none")
        self.layers = layers
        self._sizes = [2 * layer.width for layer in layers]
        self.down = nn.Linear(width, DEEP_PREFIX_RANK)
        self.up = nn.Linear(DEEP_PREFIX_RANK, sum(self._sizes))
        nn.init.normal_(self.down.weight, std=width**-0.5 / token_rms)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        with torch.no_grad():  # keys and values start at the scale of the model's own
            for rows, layer in zip(self.up.weight.split(self._sizes), layers, strict=True):
                rows[: layer.width].normal_(std=layer.key_rms * DEEP_PREFIX_RANK**-0.5)
                rows[layer.width :].normal_(std=layer.value_rms * DEEP_PREFIX_RANK**-0.5)

    def forward(self, tokens: Tensor) -> KeyValuePrefix:
        """Tokens [B, P, D], or [1, P, D] that all users share -> keys and values of every layer."""
        written = self.up(self.down(tokens)).split(self._sizes, dim=-1)
        halves = [
            both.unflatten(-1, (2, layer.num_heads, layer.head_size)).unbind(2)
            for both, layer in zip(written, self.layers, strict=True)
        ]
        return KeyValuePrefix(tuple(key for key, _ in halves), tuple(value for _, value in halves))
