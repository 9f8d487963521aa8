"""Operations on tensors: each a custom op with a torch reference, a fake, autograd and one public, checked function.

The gated product and RMSNorm, which a step calls in every frozen layer, are plain functions for autograd functions.
"""

from laser_fast.ops.catalog_cross_entropy import catalog_cross_entropy, catalog_cross_entropy_reference
from laser_fast.ops.catalog_topk import ItemLists, catalog_topk, catalog_topk_reference
from laser_fast.ops.dispatch import (
    combine_queries,
    combine_queries_reference,
    dispatch_queries,
    dispatch_queries_reference,
)
from laser_fast.ops.gated_product import gated_product_backward, gated_product_forward, gated_product_reference
from laser_fast.ops.prefix_kv import inject_prefix_kv, inject_prefix_kv_reference
from laser_fast.ops.rms_norm import NormKind, rms_norm_backward, rms_norm_forward, rms_norm_reference
from laser_fast.ops.rotary import rotary_embedding, rotary_embedding_reference
from laser_fast.ops.routing import Routing, route_experts, route_experts_reference
from laser_fast.ops.segments import (
    check_cu_seqlens,
    cu_seqlens_from_lengths,
    segment_ids,
    segment_mean,
    segment_positions,
    segment_sum,
    validate_cu_seqlens,
)

__all__ = [
    "ItemLists",
    "NormKind",
    "Routing",
    "catalog_cross_entropy",
    "catalog_cross_entropy_reference",
    "catalog_topk",
    "catalog_topk_reference",
    "check_cu_seqlens",
    "combine_queries",
    "combine_queries_reference",
    "cu_seqlens_from_lengths",
    "dispatch_queries",
    "dispatch_queries_reference",
    "gated_product_backward",
    "gated_product_forward",
    "gated_product_reference",
    "inject_prefix_kv",
    "inject_prefix_kv_reference",
    "rms_norm_backward",
    "rms_norm_forward",
    "rms_norm_reference",
    "rotary_embedding",
    "rotary_embedding_reference",
    "route_experts",
    "route_experts_reference",
    "segment_ids",
    "segment_mean",
    "segment_positions",
    "segment_sum",
    "validate_cu_seqlens",
]
