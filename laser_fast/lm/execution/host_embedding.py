"""Token embeddings that stay in host memory while the layers of their model lie on a GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from laser_fast.ops.host_copies import on_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def keep_embeddings_on_host(model: "PreTrainedModel") -> None:
    """Move the table of token embeddings of `model` to host memory for good."""
    table = model.get_input_embeddings()
    if not isinstance(table, HostEmbedding):
        model.set_input_embeddings(HostEmbedding(table))
