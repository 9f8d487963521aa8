"""M-Former (Laser, section 3.2): a mixture of query experts that reads a recommender's states and writes the prefix.

X = H W_in + b_in                     states of the packed history                 [N, D]
e_b, w_b, g_b = route(X)              k experts per user, from pooled item routing
Y = QFormer(T[e_b] ; X)               one batch of B*k groups of queries           [B*k, Q, D]
P_b = sum_j w_b[j] Y_{b,j}            combined queries                             [B, Q, D]
prefix_b = P_b W_llm + b_llm          virtual tokens of the language model         [B, Q, D_llm]
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laser_fast.nn.qformer import QFormer, initialize_like_bert
from laser_fast.ops.dispatch import combine_queries
from laser_fast.ops.precision import autocast_off
from laser_fast.ops.routing import Routing, route_experts
from laser_fast.processes import Processes

MFORMER_DTYPES = ("auto", "bfloat16", "float32")
_BF16_PRODUCTS = (8, 0)  # CUDA capability


@dataclass(frozen=True)
class MFormerOutput:
    """What M-Former computes for a batch of users."""

    prefix: Tensor | None  # [B, Q, D_llm]; None without a projection to the language model
    queries: Tensor  # [B, Q, D], the combined queries before that projection
    routing: Routing
    projected: Tensor  # [N, D], the states that the querying transformer reads
    layer_inputs: tuple[Tensor, ...] = ()  # input [B*k, Q, D] of each of its layers, if asked for


class Router(nn.Module):
    """`z_i = W_r x_i + c` per history item; the mean of the items' softmax chooses a user's k experts."""

    def __init__(self, width: int, num_experts: int, top_k: int, *, weighting: str = "softmax") -> None:
        super().__init__()
        self.top_k = top_k
        self.weighting = weighting
        self.weight = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Routing:
        """states [N, D], cu_seqlens int32 [B+1] -> `Routing`."""
        return route_experts(states, self.weight, self.bias, cu_seqlens, self.top_k, weighting=self.weighting)


class MFormer(nn.Module):
    """Router, query experts and one querying transformer that serves all of them.

    Args:
        state_size: `D_id`, width of the recommender's states.
        lm_width: `D_llm`; None for no projection, where the prefix is made of `queries` in another way.
        width: D.
        num_experts, top_k: E and k.
        num_queries: Q, query tokens per expert and prefix tokens.
        prefix_rms: scale of the prefix before training, that of the language model's token embeddings.
        recompute: see `QFormer`.
        dtype: of the products in the querying transformer and the projection behind it, where no autocast is on.
            Weights, states and routing stay float32. "auto": bfloat16 on a GPU that has it, else float32.
    """

    def __init__(
        self,
        state_size: int,
        lm_width: int | None,
        *,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_experts: int = 8,
        top_k: int = 2,
        num_queries: int = 32,
        weighting: str = "softmax",
        dropout: float = 0.1,
        prefix_rms: float = 0.02,
        recompute: bool = False,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        if dtype not in MFORMER_DTYPES:
            raise ValueError(f"MFormer: dtype must be one of {', '.join(MFORMER_DTYPES)}, got {dtype!r}")
        self.dtype = dtype
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MFormer: top_k must be from 1 to num_experts = {num_experts}, got {top_k}")
        self.state_size = state_size
        self.state_projection = nn.Linear(state_size, width)
        self.router = Router(width, num_experts, top_k, weighting=weighting)
        self.query_experts = nn.Parameter(torch.randn(num_experts, num_queries, width))
        self.qformer = QFormer(width, num_layers, num_heads, dropout=dropout, recompute=recompute)
        self.lm_projection: nn.Linear | None = None
        if lm_width is not None:
            self.lm_projection = nn.Linear(width, lm_width)
            initialize_like_bert(self.lm_projection)
            # combined queries are averages of layer-normalised rows: their entries are of order 1
            nn.init.normal_(self.lm_projection.weight, std=prefix_rms * width**-0.5)

    def forward(self, states: Tensor, cu_seqlens: Tensor, *, keep_layer_inputs: bool = False) -> MFormerOutput:
        """Write the prefix of every user of a batch.

        Args:
            states: [N, D_id], packed states of the frozen recommender, one per history item.
            cu_seqlens: int32 [B+1]; the queries of an empty history read nothing.
            keep_layer_inputs: fill `layer_inputs`, from which stage 1 generates.
        """
        if states.dim() != 2 or states.shape[1] != self.state_size:
            raise ValueError(f"MFormer: states must be [N, {self.state_size}], got {tuple(states.shape)}")
        with autocast_off(states.device):  # the routing must not depend on the precision
            projected = self.state_projection(states.to(self.state_projection.weight.dtype))
        routing = self.router(projected, cu_seqlens)
        kept: list[Tensor] | None = [] if keep_layer_inputs else None
        with self.products(states.device):
            outputs = self.qformer(self.query_experts, routing.expert, projected, cu_seqlens, kept)
            queries = combine_queries(outputs, routing.weight)
            prefix = None if self.lm_projection is None else self.lm_projection(queries)
        return MFormerOutput(prefix, queries, routing, projected, tuple(kept or ()))

    def products(self, device: torch.device) -> AbstractContextManager[object]:
        """Context in which matrix products on a device have the dtype that `dtype` says.

        The meta device has no autocast, so a plan counts float32: twice the activations of bfloat16, but none of the
        2-byte copies of the weights that autocast makes.
        """
        available = torch.amp.is_autocast_available(device.type) and not torch.is_autocast_enabled(device.type)
        if not available or self.query_experts.dtype != torch.float32:
            return nullcontext()
        narrow = self.dtype == "bfloat16"
        if self.dtype == "auto" and device.type == "cuda":
            narrow = torch.cuda.get_device_capability(device) >= _BF16_PRODUCTS
        return torch.autocast(device.type, dtype=torch.bfloat16) if narrow else nullcontext()


def balance_across(routing: Routing, cu_seqlens: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Balance loss of the users of all processes together, `E * sum_e p_e f_e`.

        p_e = (1/N) sum_b n_b pooled_b[e]      N = sum_b n_b over all processes, n_b items of user b
        f_e = (1/N) sum_r N_r load_r[e]        N_r items of process r; no gradient

    A mean of the processes' own losses is another function: it wants the load even within every process.

    Args:
        routing, cu_seqlens: of the users of this process; int32 [B+1].

    Returns:
        Loss [] and load [E], the same in every process. The gradient is exact where the processes weight the loss by
        shares that sum to 1.
    """
    if processes.size == 1:
        return routing.balance_loss, routing.load
    items = cu_seqlens.diff().to(routing.pooled.dtype)
    own = [items @ routing.pooled, routing.load * items.sum(), items.sum()[None]]
    probability, load, count = processes.sum(torch.cat(own)).split([len(routing.load), len(routing.load), 1])
    count = count.detach().clamp_min(1.0)
    probability, load = probability / count, load.detach() / count
    return len(load) * torch.dot(probability, load), load
