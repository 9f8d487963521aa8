"""Token embeddings that stay in host memory while the layers of their model lie on a GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from laser_fast.ops.host_copies import on_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HostEmbedding(nn.Module):
    """Looks rows up on the host and copies them to the device of the ids; `to` and `cuda` leave the table alone.

    The table, which may scale or normalise what it looks up, takes hundreds of megabytes to gigabytes, and a step reads
    a few thousand rows of it.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table.to("cpu")

    @property
    def weight(self) -> Any:
        """The table itself: [vocabulary, D_llm]."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] on any device -> [..., D_llm] on the same device; waits for it where the host knows no ids."""
        rows: Tensor = self.table(on_host(input_ids))
        if input_ids.device.type == "cuda":  # so the copy runs beside what the device is at
            rows = rows.pin_memory()
        return rows.to(input_ids.device, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        # every move and cast of a module that holds this one ends here
        return self


def keep_embeddings_on_host(model: "PreTrainedModel") -> None:
    """Move the table of token embeddings of `model` to host memory for good; repeating it changes nothing."""
    table = model.get_input_embeddings()
    if not isinstance(table, HostEmbedding):
        model.set_input_embeddings(HostEmbedding(table))
