"""The frozen language model on packed sequences: any Hugging Face encoder or decoder, its attention replaced by ours.

The replacement goes through the interfaces transformers offers for it (`AttentionInterface`,
`AttentionMaskInterface`) under the name "laser_varlen": all sequences of a batch run as one row `[1, T]`, and the
attention of every layer reads where each sequence starts from a keyword argument of the forward.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laser_fast.nn.attention import AttentionPlan, varlen_attention
from laser_fast.nn.frozen import FrozenModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "laser_varlen"

# options of an attention that change its result and that the packed attention does not have (transformers' names)
_REFUSED_OPTIONS = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}


class PackedLayout:
    """Where the sequences of one packed batch start, and the attention plans made for them so far."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        self.num_attention_calls = 0
        self._plans: dict[tuple[bool, int | None], AttentionPlan] = {}

    def plan(self, causal: bool, sliding_window: int | None) -> AttentionPlan:
        """The plan for this kind of mask, made at its first use and shared by all layers."""
        kind = (causal, sliding_window)
        if kind not in self._plans:
            self._plans[kind] = AttentionPlan.build(self.cu_seqlens, causal=causal, sliding_window=sliding_window)
        return self._plans[kind]


class FrozenLM(FrozenModule):
    """A frozen Hugging Face model that maps packed input embeddings to packed last hidden states.

    Attributes:
        hidden_size: width `D_llm`.
        causal: whether its attention is causal (a decoder) or bidirectional (an encoder).
        max_length: longest sequence its position embeddings allow; None = no limit stated.
        embedding_rms: root mean square of its token embeddings, the scale at which virtual tokens start.

    Raises:
        ValueError: an encoder-decoder, a model without a table of token embeddings, or one that cannot exchange its
            attention.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"FrozenLM: the model must be an encoder or a decoder, got the encoder-decoder {model.name_or_path!r}"
            )
        _register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.hidden_size: int = config.hidden_size
        self.causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.freeze()
        table = model.get_input_embeddings().weight
        self.embedding_rms = float(table[:: max(1, table.shape[0] // 4096)].float().square().mean().sqrt())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the embeddings it takes."""
        return next(self.model.parameters()).dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings: int64 [T] -> [T, D_llm], without gradient."""
        with torch.no_grad():
            embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def forward(self, inputs_embeds: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Last hidden states of packed sequences; gradients reach `inputs_embeds` and no weight.

        Args:
            inputs_embeds: [T, D_llm].
            cu_seqlens: int32 [B+1]. Positions count from 0 in every sequence.

        Returns:
            [T, D_llm], in the dtype of the model.

        Raises:
            ValueError: a sequence longer than `max_length`, or an attention option of the model that cannot be
                honoured.
            RuntimeError: the model does not call the exchangeable attention, so its result would mix sequences.
        """
        if inputs_embeds.dim() != 2 or inputs_embeds.shape[1] != self.hidden_size:
            raise ValueError(
                f"FrozenLM: inputs_embeds must be [T, {self.hidden_size}], got {tuple(inputs_embeds.shape)}"
            )
        inputs_embeds = inputs_embeds.to(self.dtype)
        if inputs_embeds.shape[0] == 0:
            return inputs_embeds
        lengths = cu_seqlens.diff().long()
        if self.max_length is not None and int(longest := lengths.max()) > self.max_length:
            raise ValueError(
                f"FrozenLM: a sequence must have at most {self.max_length} tokens with its prefix and suffix, "
                f"got {int(longest)}; lower prompt.max_tokens or prompt.max_items"
            )
        starts = cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=inputs_embeds.shape[0])
        positions = torch.arange(inputs_embeds.shape[0], device=inputs_embeds.device) - starts
        layout = PackedLayout(cu_seqlens)
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        output = self.model(
            inputs_embeds=inputs_embeds[None], position_ids=positions[None], laser_layout=layout, **options
        )
        if layout.num_attention_calls == 0:
            raise RuntimeError(
                f"FrozenLM: {type(self.model).__name__} must call transformers' AttentionInterface, got no call; "
                "this architecture cannot run on packed sequences"
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


def _register_attention() -> None:
    """Make "laser_varlen" known to transformers; repeating it changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says who sees whom, so no [T, T] mask is ever made."""


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    laser_layout: PackedLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The signature transformers calls: query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d]."""
    if laser_layout is None:
        raise RuntimeError('attention "laser_varlen": the model must be called through FrozenLM, got a direct call')
    for name, meaning in _REFUSED_OPTIONS.items():
        if options.get(name) is not None:
            raise ValueError(f"FrozenLM: {type(module).__name__} must not use {meaning}, got {name}={options[name]!r}")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    laser_layout.num_attention_calls += 1
    output = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        laser_layout.cu_seqlens,
        causal=causal,
        scale=scaling,
        dropout=dropout,
        plan=laser_layout.plan(causal, sliding_window),
    )
    return output[None], None
