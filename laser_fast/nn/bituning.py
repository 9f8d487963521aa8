"""Bi-Tuning (Laser, section 3.1): trainable virtual tokens before and after the text of a frozen language model.

input   = [prefix (Q) ; text ; suffix (S)]     per sequence, packed
readout = last hidden state at the suffix, or the mean over text and suffix
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laser_fast.ops.segments import lengthened_cu_seqlens, segment_ids, segment_mean, validate_cu_seqlens


@dataclass(frozen=True)
class BiTunedInput:
    """Packed input embeddings of a batch, and its tokens without the prefixes."""

    inputs_embeds: Tensor  # [T', D], T' = T + B * (Q + S)
    cu_seqlens: Tensor  # int32 [B+1] over T'
    text_and_suffix: Tensor  # int64 [T + B*S], their positions in T'
    text_and_suffix_cu_seqlens: Tensor  # int32 [B+1] over these positions


class BiTuning(nn.Module):
    """The suffix, the shared prefix where there is one, and the read-out.

    Args:
        width: `D_llm`.
        num_suffix_tokens: S >= 1.
        num_shared_prefix_tokens: Q of a learned prefix that all sequences share; 0 for none.
        readout: "suffix" or "mean".
        embedding_rms: scale of the random virtual tokens, that of the language model's token embeddings.
    """

    def __init__(
        self,
        width: int,
        *,
        num_suffix_tokens: int = 1,
        num_shared_prefix_tokens: int = 0,
        readout: str = "suffix",
        embedding_rms: float = 0.02,
    ) -> None:
        super().__init__()
        if num_suffix_tokens < 1:
            raise ValueError(f"BiTuning: num_suffix_tokens must be at least 1, got {num_suffix_tokens}")
        if readout not in ("suffix", "mean"):
            raise ValueError(f'BiTuning: readout must be "suffix" or "mean", got {readout!r}')
        self.readout = readout
        self.suffix_tokens = nn.Parameter(torch.randn(num_suffix_tokens, width) * embedding_rms)
        shared = torch.randn(num_shared_prefix_tokens, width) * embedding_rms
        self.prefix_tokens = nn.Parameter(shared) if num_shared_prefix_tokens else None

    def shared_prefix(self, batch_size: int) -> Tensor | None:
        """The learned prefix of each sequence, [B, Q, D]; None where there is none."""
        return None if self.prefix_tokens is None else self.prefix_tokens.expand(batch_size, -1, -1)

    def assemble(self, prefix: Tensor | None, text_embeds: Tensor, cu_seqlens: Tensor) -> BiTunedInput:
        """Put prefix and suffix around the packed text, in one gather.

        Args:
            prefix: [B, Q, D] or None.
            text_embeds: [T, D].
            cu_seqlens: int32 [B+1] over T.
        """
        validate_cu_seqlens("BiTuning.assemble", cu_seqlens, text_embeds.shape[0])
        batch_size, num_text, device = cu_seqlens.shape[0] - 1, text_embeds.shape[0], text_embeds.device
        num_prefix = 0 if prefix is None else prefix.shape[1]
        num_suffix = self.suffix_tokens.shape[0]
        added = num_prefix + num_suffix
        bounds, inner_bounds = (lengthened_cu_seqlens(cu_seqlens, rows) for rows in (added, num_suffix))
        # where each row of [all prefixes; all text; all suffixes] goes
        prefix_to = bounds[:-1, None].long() + torch.arange(num_prefix, device=device)
        text_to = torch.arange(num_text, device=device) + segment_ids(cu_seqlens, num_text) * added + num_prefix
        suffix_to = bounds[1:, None].long() + torch.arange(-num_suffix, 0, device=device)
        sources = [text_embeds, self.suffix_tokens.to(text_embeds.dtype).expand(batch_size, -1, -1).flatten(0, 1)]
        if prefix is not None:
            sources.insert(0, prefix.to(text_embeds.dtype).flatten(0, 1))
        rows = torch.cat(sources)
        destination = torch.cat([prefix_to.flatten(), text_to, suffix_to.flatten()])
        embeds = torch.zeros_like(rows).index_copy(0, destination, rows)
        num_inner = num_text + batch_size * num_suffix
        inner = torch.arange(num_inner, device=device) + (segment_ids(inner_bounds, num_inner) + 1) * num_prefix
        return BiTunedInput(embeds, bounds, inner, inner_bounds)

    def read_out(self, hidden: Tensor, packed: BiTunedInput) -> Tensor:
        """Embedding of each sequence: hidden [T', D] -> float32 [B, D]."""
        if self.readout == "suffix":
            return hidden.index_select(0, packed.cu_seqlens[1:].long() - 1).float()
        return segment_mean(hidden.index_select(0, packed.text_and_suffix).float(), packed.text_and_suffix_cu_seqlens)
