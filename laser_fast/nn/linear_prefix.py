"""A prefix without a transformer: one affine map of what the recommender knows of the user.

h_b      = state of the newest item of user b                    [B, D_id]
prefix_b = h_b W + C, as Q rows of the language model's width    [B, Q, D_llm]

What M-Former has to beat; a mapping of this kind puts a collaborative embedding before the text in CoLLM
(arXiv:2310.19488) and LLaRA (arXiv:2312.02445).
"""

import torch
from torch import Tensor, nn


class LinearPrefix(nn.Module):
    """Writes the prefix from the state of the newest item alone.

    Args:
        state_size: `D_id`, width of the recommender's states.
        lm_width: `D_llm`.
        num_tokens: Q, prefix tokens.
        rms: scale of the prefix at the start (that of the language model's token embeddings).
    """

    def __init__(self, state_size: int, lm_width: int, *, num_tokens: int, rms: float = 0.02) -> None:
        super().__init__()
        self.state_size = state_size
        self.num_tokens = num_tokens
        self.weight = nn.Parameter(torch.randn(state_size, num_tokens * lm_width) * rms * state_size**-0.5)
        self.tokens = nn.Parameter(torch.randn(num_tokens, lm_width) * rms)

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Prefix tokens of every user, [B, Q, D_llm].

        Args:
            states: [N, D_id], packed states of the frozen recommender, one per history item, oldest first.
            cu_seqlens: int32 [B+1]; a user without history gets C.

        Raises:
            ValueError: states of another width.
        """
        if states.dim() != 2 or states.shape[1] != self.state_size:
            raise ValueError(f"LinearPrefix: states must be [N, {self.state_size}], got {tuple(states.shape)}")
        from_one = torch.cat([states.new_zeros(1, self.state_size), states])  # row 0 is that of an empty history
        newest = from_one[torch.where(cu_seqlens.diff() > 0, cu_seqlens[1:], 0)]
        return (newest @ self.weight).view(-1, *self.tokens.shape) + self.tokens
