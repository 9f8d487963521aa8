"""The querying transformer and its text branch initialised from a BERT checkpoint, as in BLIP-2.

Queries and text both get BERT's feed-forwards and the norm of its embeddings; they share its self-attention. The text
gets its position embeddings plus the first token type. Cross-attention, query tokens, the router and the map from the
language model's token embeddings stay random. With BERT's word embeddings and the identity as that map, the text branch
computes BERT's hidden states, apart from the epsilon of its norms (1e-5 here, 1e-12 in BERT).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.config import resolve_path
from laser_fast.nn.qformer import QFormer
from laser_fast.nn.stage1.text_branch import TextBranch

if TYPE_CHECKING:
    from transformers import BertModel


def load_bert(folder: str, qformer: QFormer) -> "BertModel":
    """Read a local BERT with at least as many layers as the querying transformer, and of its sizes."""
    from transformers import AutoModel, BertModel

    bert = AutoModel.from_pretrained(
        resolve_path(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    if not isinstance(bert, BertModel):
        raise ValueError(f"load_bert: mformer.initialize_from must hold a BERT, got a {type(bert).__name__}")
    config, first = bert.config, qformer.blocks[0]
    wanted = {
        "hidden_size": qformer.norm.weight.shape[0],
        "num_attention_heads": first.self_attention.num_heads,
        "intermediate_size": first.feed_forward.wide.out_features,
        "hidden_act": "gelu",
    }
    if config.num_hidden_layers < len(qformer.layers):
        wanted["num_hidden_layers"] = len(qformer.layers)
    if config.is_decoder:
        wanted["is_decoder"] = False
    differences = [f"{name} {getattr(config, name)}" for name in wanted if getattr(config, name) != wanted[name]]
    if differences:
        rule = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise ValueError(
            f"load_bert: the BERT of mformer.initialize_from must have {rule}, got {', '.join(differences)}; change "
            "mformer.width, num_heads or num_layers, or take another checkpoint"
        )
    return bert


@torch.no_grad()
def initialize_qformer(qformer: QFormer, bert: "BertModel") -> None:
    """Copy BERT's weights to the layers of the queries, apart from cross-attention."""
    _copy(qformer.norm, bert.embeddings.LayerNorm)
    for layer, source in zip(qformer.blocks, bert.encoder.layer, strict=False):
        own, attention = layer.self_attention, source.attention
        parts = [attention.self.query, attention.self.key, attention.self.value]
        own.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        own.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        _copy(own.out, attention.output.dense)
        _copy(own.norm, attention.output.LayerNorm)
        _copy_feed_forward(layer.feed_forward, source)


@torch.no_grad()
def initialize_text_branch(text: TextBranch, bert: "BertModel") -> None:
    """Copy BERT's weights to the text's feed-forwards, norm and positions; those past BERT's last stay random."""
    _copy(text.norm, bert.embeddings.LayerNorm)
    positions: Tensor = bert.embeddings.position_embeddings.weight + bert.embeddings.token_type_embeddings.weight[0]
    count = min(len(positions), len(text.positions))
    text.positions[:count].copy_(positions[:count])
    for feed_forward, source in zip(text.feed_forwards, bert.encoder.layer, strict=False):
        _copy_feed_forward(feed_forward, source)


def _copy_feed_forward(own: Any, source: Any) -> None:
    _copy(own.wide, source.intermediate.dense)
    _copy(own.out, source.output.dense)
    _copy(own.norm, source.output.LayerNorm)


def _copy(own: nn.Module, source: nn.Module) -> None:
    own.load_state_dict(source.state_dict())
