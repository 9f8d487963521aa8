"""Tables of token embeddings that take no memory of a GPU: in host memory, or of one row for all tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from laser_fast.ops.host_copies import on_host


class HostEmbedding(nn.Module):
    """Looks rows up on the host and copies them to the device of the ids; `to` and `cuda` leave the table alone.

    A table takes hundreds of megabytes to gigabytes, and a step reads a few thousand rows of it.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table.to("cpu")

    @property
    def weight(self) -> Any:
        """[vocabulary, D_llm]."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D_llm] on the same device, for which the host waits unless it knows the ids."""
        rows: Tensor = self.table(on_host(input_ids))
        if input_ids.device.type == "cuda":  # lets the copy run beside the work of the device
            rows = rows.pin_memory()
        return rows.to(input_ids.device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        # every move and cast of the model ends here
        return self


class OneRowEmbedding(nn.Module):
    """A table of token embeddings in which all tokens share one row."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.num_tokens = table.weight.shape[0]
        table.weight = nn.Parameter(table.weight[:1], requires_grad=False)
        table.num_embeddings, table.padding_idx = 1, None  # the row of padding would be zero
        self.table = table

    @property
    def weight(self) -> Any:
        """[num_tokens, D_llm], a read-only view of one row."""
        row: Any = self.table.weight
        return row.detach().expand(self.num_tokens, -1)

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D_llm]."""
        rows: Tensor = self.table(torch.zeros_like(input_ids))
        return rows
