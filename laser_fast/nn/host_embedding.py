"""Token embeddings that stay in host memory while the layers of their model lie on a GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HostEmbedding(nn.Module):
    """Looks rows up on the host and copies them to the device of the ids; `to` and `cuda` leave the table alone.

    The table takes hundreds of megabytes to gigabytes and a step reads a few thousand rows of it.

    Attributes:
        table: the model's own module, which may scale or normalise what it looks up.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table.to("cpu")

    @property
    def weight(self) -> Any:
        """Of the table: [vocabulary, D_llm]."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] on any device -> [..., D_llm] on the same device."""
        rows: Tensor = self.table(input_ids.to("cpu"))
        return rows.to(input_ids.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        # every move and cast of a module that holds this one ends here
        return self


def keep_embeddings_on_host(model: "PreTrainedModel") -> None:
    """Move the table of token embeddings of `model` to host memory for good; repeating it changes nothing."""
    table = model.get_input_embeddings()
    if not isinstance(table, HostEmbedding):
        model.set_input_embeddings(HostEmbedding(table))
