"""Bi-Tuning (Laser, section 3.1): trainable virtual tokens before and after the text of a frozen language model.

input   = [prefix (Q) ; text ; suffix (S)]     per sequence, packed
readout = last hidden state at the suffix, or the mean over text and suffix
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laser_fast.ops.segments import lengthened_cu_seqlens, segment_mean, validate_cu_seqlens


@dataclass(frozen=True)
class BiTunedInput:
    """Packed input embeddings of a batch, and where its read-out tokens are."""

    inputs_embeds: Tensor  # [T', D], T' = T + B * (Q + S)
    cu_seqlens: Tensor  # int32 [B+1] over T'
    text_and_suffix: Tensor  # int64 [T + B*S], positions in T' of all tokens but the prefix, sequence by sequence
    text_and_suffix_cu_seqlens: Tensor  # int32 [B+1] over them


class BiTuning(nn.Module):
    """The suffix, the shared prefix where there is one, and the read-out.

    Args:
        width: `D_llm`.
        num_suffix_tokens: S >= 1.
        num_shared_prefix_tokens: Q of a learned prefix that all sequences share; 0 = none.
        readout: "suffix" or "mean".
        embedding_rms: scale of the language model's token embeddings; virtual tokens start at random at that scale.
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
        self.prefix_tokens: nn.Parameter | None = None
        if num_shared_prefix_tokens:
            self.prefix_tokens = nn.Parameter(torch.randn(num_shared_prefix_tokens, width) * embedding_rms)

    def shared_prefix(self, batch_size: int) -> Tensor | None:
        """The learned prefix for each of `batch_size` sequences: [B, Q, D], or None."""
        return None if self.prefix_tokens is None else self.prefix_tokens.expand(batch_size, -1, -1)

    def assemble(self, prefix: Tensor | None, text_embeds: Tensor, cu_seqlens: Tensor) -> BiTunedInput:
        """Put prefix and suffix around the packed text, in one gather.

        Args:
            prefix: [B, Q, D] or None.
            text_embeds: [T, D].
            cu_seqlens: int32 [B+1] over T.

        Raises:
            TypeError, ValueError: offsets that do not run from 0 to T.
        """
        validate_cu_seqlens("BiTuning.assemble", cu_seqlens, text_embeds.shape[0])
        batch_size, num_text = cu_seqlens.shape[0] - 1, text_embeds.shape[0]
        num_prefix = 0 if prefix is None else prefix.shape[1]
        num_suffix = self.suffix_tokens.shape[0]
        device = text_embeds.device
        sequences = torch.arange(batch_size, device=device)
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        of_token = sequences.repeat_interleave(ends - starts, output_size=num_text)
        # destination of every source row: [all prefixes; all text; all suffixes]
        shift = num_prefix + num_suffix
        prefix_to = (starts + sequences * shift)[:, None] + torch.arange(num_prefix, device=device)
        text_to = torch.arange(num_text, device=device) + of_token * shift + num_prefix
        suffix_to = (ends + sequences * shift + num_prefix)[:, None] + torch.arange(num_suffix, device=device)
        suffix = self.suffix_tokens.to(text_embeds.dtype).expand(batch_size, -1, -1).flatten(0, 1)
        sources = [text_embeds, suffix]
        if prefix is not None:
            sources.insert(0, prefix.to(text_embeds.dtype).flatten(0, 1))
        destination = torch.cat([prefix_to.flatten(), text_to, suffix_to.flatten()])
        rows = torch.cat(sources)
        embeds = torch.zeros_like(rows).index_copy(0, destination, rows)
        num_inner = num_text + batch_size * num_suffix
        inner_of_token = sequences.repeat_interleave(ends - starts + num_suffix, output_size=num_inner)
        inner = torch.arange(num_inner, device=device) + (inner_of_token + 1) * num_prefix
        bounds, inner_bounds = (lengthened_cu_seqlens(cu_seqlens, rows) for rows in (shift, num_suffix))
        return BiTunedInput(embeds, bounds, inner, inner_bounds)

    def read_out(self, hidden: Tensor, packed: BiTunedInput) -> Tensor:
        """Embedding of each sequence: hidden [T', D] -> [B, D], float32."""
        if self.readout == "suffix":
            return hidden.index_select(0, packed.cu_seqlens[1:].long() - 1).float()
        return segment_mean(hidden.index_select(0, packed.text_and_suffix).float(), packed.text_and_suffix_cu_seqlens)
