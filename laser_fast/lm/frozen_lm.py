"""The frozen language model on packed sequences: any Hugging Face encoder or decoder, its attention replaced by ours.

Embeddings [T, D_llm] go through the layers, whose attention reads the layout of the batch, to last hidden states.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.lm.exchanged_attention import ATTENTION_NAME, register_attention, running
from laser_fast.lm.execution.compiled_layers import is_compiled
from laser_fast.lm.execution.execution import Execution, apply_execution
from laser_fast.lm.frozen_module import FrozenModule
from laser_fast.lm.key_value_prefix import KeyValuePrefix, LayerShape
from laser_fast.lm.packed_layout import PackedLayout
from laser_fast.lm.packing_check import PROBE_TOKENS, first_position
from laser_fast.lm.uncompiled import uncompiled
from laser_fast.ops.segments import even_cu_seqlens, lengths_on_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FINDING = threading.Lock()
_MEASURED_TOKENS = 16  # whose keys and values tell their scale


class FrozenLM(FrozenModule):
    """A frozen Hugging Face model that maps packed input embeddings to packed last hidden states.

    Args:
        model: loaded; it is frozen, and some of its modules get another `forward`. Only the base of a model with a head
            (`AutoModelForCausalLM` and its like) is held.
        execution: how it runs a step; None = the defaults.

    Attributes:
        hidden_size: width `D_llm`.
        causal: whether its attention is causal (a decoder) or bidirectional (an encoder).
        max_length: longest sequence its position embeddings allow; None = no limit stated.
        layer_of: index of every attention module in the order of its first call.
        execution, replaced: how it runs a step, and how many of its modules run so.
        fixed_shapes: answers calls without gradient in place of the model, see `FixedShapes`; None = not used.

    Raises:
        TypeError: no model of transformers, or one that another library has wrapped.
        ValueError: an encoder-decoder, a model without a table of token embeddings or with a head and no base, or one
            that cannot exchange its attention.
    """

    def __init__(self, model: "PreTrainedModel", execution: Execution | None = None) -> None:
        super().__init__()
        model = _without_head(model)
        config = model.config.get_text_config()
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.hidden_size: int = config.hidden_size
        self.causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.fixed_shapes: Callable[..., Tensor | None] | None = None
        self.layer_of: dict[nn.Module, int] = {}
        self._first_position: int | None = None
        self.freeze()
        self.execution = execution or Execution()
        self.replaced = apply_execution(model, self.execution)

    def run_as(self, execution: Execution) -> None:
        """Run every step this way from now on.

        Raises:
            ValueError: the model has no modules of the kind that is asked for; it then keeps its execution.
            RuntimeError: its layers are compiled.
        """
        if is_compiled(self.model):
            raise RuntimeError(
                "FrozenLM: layers must not be compiled to run in another way, got compiled ones; "
                'call serving.use("none") first'
            )
        try:
            self.replaced = apply_execution(self.model, execution)
        except ValueError:
            apply_execution(self.model, self.execution)
            raise
        self.execution = execution

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of at most 8,191 token embeddings: the scale at which virtual tokens start."""
        table = self.model.get_input_embeddings().weight
        return _root_mean_square(table[:: max(1, table.shape[0] // 4096)])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its token embeddings, to which inputs are cast."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of its layers; the table of token embeddings may lie in host memory."""
        table = self.model.get_input_embeddings().weight
        device: torch.device = next((p.device for p in self.model.parameters() if p is not table), table.device)
        return device

    @cached_property
    def layers(self) -> list[LayerShape]:
        """Keys and values of every attention layer, found with a few random embeddings."""
        found = self.key_values(self._random_embeds(_MEASURED_TOKENS)[None])
        return [
            LayerShape(key.shape[2], key.shape[3], _root_mean_square(key), _root_mean_square(value))
            for key, value in zip(found.keys, found.values, strict=True)
        ]

    @property
    def first_position(self) -> int:
        """The number from which the model counts positions, found with the first call."""

        def run_packed(embeds: Tensor, cu_seqlens: Tensor, start: int) -> tuple[Tensor, int]:
            layout = PackedLayout(cu_seqlens, self.layer_of, None)
            return self.run_layers(embeds, layout, start), layout.num_attention_calls

        if self._first_position is None:
            with _FINDING:  # meanwhile the model has another attention, so other threads wait
                if self.device.type == "meta":
                    self._first_position = 0
                if self._first_position is None:
                    embeds = self._random_embeds(PROBE_TOKENS)
                    self._first_position = first_position(self.model, run_packed, embeds)
        return self._first_position

    def _random_embeds(self, num_tokens: int) -> Tensor:
        with torch.inference_mode(False):
            drawn = torch.randn(num_tokens, self.hidden_size, generator=torch.Generator().manual_seed(0))
            return (drawn * self.embedding_rms).to(self.device, self.dtype)

    @uncompiled
    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings: int64 [T] -> [T, D_llm] on the device of the layers, without gradient."""
        with torch.no_grad():
            embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded.to(self.device)

    @uncompiled
    def forward(
        self,
        inputs_embeds: Tensor,
        cu_seqlens: Tensor,
        prefix: KeyValuePrefix | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Last hidden states of packed sequences; gradients reach `inputs_embeds` and `prefix` and no weight.

        Args:
            inputs_embeds: [T, D_llm].
            cu_seqlens: int32 [B+1].
            prefix: keys and values in front of every sequence, whose positions then count from its length P.
            last_only: give the state of the last position of every sequence alone. No sequence may then be empty, and
                the last layer is spared most of its work where `Execution.last_layer` allows it.

        Returns:
            [T, D_llm], or [B, D_llm] with `last_only`, in the dtype of the model.

        Raises:
            ValueError: a sequence longer than `max_length`, a prefix that does not fit, or an attention option of the
                model that cannot be honoured.
            RuntimeError: the model does not call the exchangeable attention, or it gives a sequence other states
                packed than alone.
        """
        if prefix is not None:
            _check_prefix(prefix, self.layers, cu_seqlens.shape[0] - 1)
        shapes = self.fixed_shapes  # another thread may choose another mode of serving meanwhile
        if shapes is not None and not torch.is_grad_enabled():
            served = shapes(inputs_embeds, cu_seqlens, prefix, last_only=last_only)
            if served is not None:
                return served
        return self._run(inputs_embeds, PackedLayout(cu_seqlens, self.layer_of, prefix, last_only=last_only))

    @uncompiled
    def key_values(self, inputs_embeds: Tensor, prefix: KeyValuePrefix | None = None) -> KeyValuePrefix:
        """Keys and values of B sequences of one length, to be injected in front of what follows them.

        A causal model then computes what follows as if the sequences stood there. In a bidirectional one the sequences
        would see what follows, so the results differ. Gradients reach `inputs_embeds`.

        Args:
            inputs_embeds: [B, P, D_llm].
            prefix: what stands in front of them already; not part of the result.
        """
        batch_size, length = inputs_embeds.shape[:2]
        bounds = even_cu_seqlens(batch_size, length, inputs_embeds.device)
        layout = PackedLayout(bounds, self.layer_of, prefix, keep=True)
        self._run(inputs_embeds.flatten(0, 1), layout)
        ordered = [layout.read[layer] for layer in range(len(layout.read))]
        return KeyValuePrefix(
            tuple(key.unflatten(0, (batch_size, length)) for key, _ in ordered),
            tuple(value.unflatten(0, (batch_size, length)) for _, value in ordered),
        )

    def _run(self, inputs_embeds: Tensor, layout: PackedLayout) -> Tensor:
        if inputs_embeds.dim() != 2 or inputs_embeds.shape[1] != self.hidden_size:
            raise ValueError(
                f"FrozenLM: inputs_embeds must be [T, {self.hidden_size}], got {tuple(inputs_embeds.shape)}"
            )
        inputs_embeds = inputs_embeds.to(self.dtype)
        if inputs_embeds.shape[0] == 0:
            return layout.wanted(inputs_embeds)
        if self.max_length is not None:
            self.check_length(max(lengths_on_host(layout.cu_seqlens_k), default=0))
        return self.run_layers(inputs_embeds, layout)

    def check_length(self, longest: int) -> None:
        """Raise a ValueError where the model allows no sequence of `longest` tokens, its prefix counted."""
        allowed = longest if self.max_length is None else self.max_length - self.first_position
        if longest > allowed:
            raise ValueError(
                f"FrozenLM: a sequence must have at most {allowed} tokens with its prefix and suffix, "
                f"got {longest}; lower prompt.max_tokens or prompt.max_items"
            )

    def run_layers(self, inputs_embeds: Tensor, layout: PackedLayout, first: int | None = None) -> Tensor:
        """Checked embeddings [T, D_llm] in the dtype of the model -> the states that the layout wants.

        Args:
            first: the first position; None = `first_position`.
        """
        first = self.first_position if first is None else first
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        # without a mask transformers reads the positions on the host; one of four dimensions it takes as it is. A model
        # that multiplies by it multiplies by one
        options["attention_mask"] = inputs_embeds.new_ones(1, 1, 1, 1)
        with running(layout):
            output = self.model(
                inputs_embeds=inputs_embeds[None],
                position_ids=layout.positions(inputs_embeds.shape[0])[None] + first,
                **options,
            )
        if layout.num_attention_calls == 0:
            raise RuntimeError(
                f"FrozenLM: {type(self.model).__name__} must call transformers' AttentionInterface, got no call; "
                "this architecture cannot run on packed sequences"
            )
        return layout.wanted(output.last_hidden_state[0])


def _without_head(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model itself, or its base where it has a head."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"FrozenLM: the model must be one of transformers (PreTrainedModel), got a {name}; hand in the model "
            "inside of it (of PEFT: model.merge_and_unload())"
        )
    if any(getattr(one, "is_encoder_decoder", False) for one in (model.config, model.config.get_text_config())):
        raise ValueError(
            f"FrozenLM: the model must be an encoder or a decoder, got the encoder-decoder {model.name_or_path!r}"
        )
    base = model.base_model
    try:
        embeddings = base.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embeddings = None
    if embeddings is None or (base is model and model.get_output_embeddings() is not None):
        raise ValueError(
            f"FrozenLM: the model must have a base with a table of token embeddings and no head, got {name}; load it "
            "by AutoModel"
        )
    base.name_or_path = base.name_or_path or model.name_or_path
    return base


def _root_mean_square(tensor: Tensor) -> float:
    return 1.0 if tensor.is_meta else float(tensor.float().square().mean().sqrt())


def _check_prefix(prefix: KeyValuePrefix, layers: list[LayerShape], batch_size: int) -> None:
    if len(prefix.keys) != len(layers):
        raise ValueError(f"FrozenLM: prefix must have {len(layers)} layers, got {len(prefix.keys)}")
    if prefix.batch_size not in (1, batch_size):
        raise ValueError(f"FrozenLM: prefix must be shared or one for each of {batch_size}, got {prefix.batch_size}")
    for layer, (key, shape) in enumerate(zip(prefix.keys, layers, strict=True)):
        if tuple(key.shape[2:]) != (shape.num_heads, shape.head_size):
            raise ValueError(
                f"FrozenLM: prefix of layer {layer} must have {shape.num_heads} heads of {shape.head_size}, "
                f"got {tuple(key.shape[2:])}"
            )
