"""Operations on tensors: each a custom op with a torch reference, a fake, autograd and one public, checked function.

`gated_product` and `rms_norm` hold plain functions, which the frozen layers call in autograd functions of their own.
"""

from laser_fast.ops.catalog_cross_entropy import catalog_cross_entropy, catalog_cross_entropy_reference
from laser_fast.ops.catalog_topk import ItemLists, catalog_topk, catalog_topk_reference
from laser_fast.ops.dispatch import (
    combine_queries,
    combine_queries_reference,
    dispatch_queries,
    dispatch_queries_reference,
)
from laser_fast.ops.prefix_kv import inject_prefix_kv, inject_prefix_kv_reference
from laser_fast.ops.rotary import rotary_embedding, rotary_embedding_reference
from laser_fast.ops.routing import Routing, route_experts, route_experts_reference
from laser_fast.ops.segments import (
    cu_seqlens_from_lengths,
    segment_ids,
    segment_mean,
    segment_positions,
    segment_sum,
)

__all__ = [
    "ItemLists",
    "Routing",
    "catalog_cross_entropy",
    "catalog_cross_entropy_reference",
    "catalog_topk",
    "catalog_topk_reference",
    "combine_queries",
    "combine_queries_reference",
    "cu_seqlens_from_lengths",
    "dispatch_queries",
    "dispatch_queries_reference",
    "inject_prefix_kv",
    "inject_prefix_kv_reference",
    "rotary_embedding",
    "rotary_embedding_reference",
    "route_experts",
    "route_experts_reference",
    "segment_ids",
    "segment_mean",
    "segment_positions",
    "segment_sum",
]
