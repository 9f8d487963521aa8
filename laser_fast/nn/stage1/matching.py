"""The pairs of users and texts in the matching term of stage 1, with BLIP-2's hard negatives."""

import torch
from torch import Tensor

from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.segments import segment_positions


@torch.no_grad()
def same_rows(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which packed sequences are equal: int64 [T], int32 [B+1] -> bool [B, B]; compared on the host."""
    device, values, cu_seqlens = values.device, on_host(values), on_host(cu_seqlens)
    lengths = cu_seqlens.diff().long()
    batch_size, total = lengths.shape[0], values.shape[0]
    if batch_size == 0:
        return torch.zeros(0, 0, dtype=torch.bool, device=device)
    padded = values.new_zeros(batch_size, int(lengths.max()) + 1)
    padded[:, 0] = lengths  # a shorter sequence must differ from one that ends in zeros
    row = torch.arange(batch_size).repeat_interleave(lengths, output_size=total)
    padded[row, segment_positions(cu_seqlens, total) + 1] = values
    group = torch.unique(padded, dim=0, return_inverse=True)[1]
    return to_device(group[:, None] == group[None], device)


@torch.no_grad()
def draw_negatives(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """One hard negative for each row, drawn by torch's generator in proportion to the softmax of its similarities.

    Args:
        similarity: [B, B], over the temperature.
        same: bool [B, B], pairs that are no negatives: the diagonal, and equal rows.

    Returns:
        int64 [R], the rows that have a negative, and int64 [R], the negatives.
    """
    rows = (~same).any(dim=1).nonzero().squeeze(1)
    if rows.numel() == 0:
        return rows, rows
    chance = similarity.float().masked_fill(same, -torch.inf).index_select(0, rows).softmax(dim=1)
    return rows, torch.multinomial(chance, 1).squeeze(1)


@torch.no_grad()
def matching_pairs(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The true pairs, a negative text for each user and a negative user for each text: P <= 3B pairs.

    Args:
        similarity, same: of users with texts, as in `draw_negatives`.

    Returns:
        int64 [P] users, ascending; int64 [P] texts; bool [P], which pairs are true.
    """
    everyone = torch.arange(same.shape[0], device=same.device)
    users, negative_texts = draw_negatives(similarity, same)
    texts, negative_users = draw_negatives(similarity.T, same)
    pair_users = torch.cat([everyone, users, negative_users])
    pair_texts = torch.cat([everyone, negative_texts, texts])
    order = torch.argsort(pair_users, stable=True)
    return pair_users[order], pair_texts[order], order < same.shape[0]
