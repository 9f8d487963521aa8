"""The network of Laser: a frozen language model reads [instruction; prefix; text; suffix] into one embedding."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laser_fast.data.batches import PackedBatch
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.lm.weights_version import VersionedModule, WeightsVersion
from laser_fast.models.device_batches import on_device
from laser_fast.models.objective import LaserOutput, Objective, StepContext
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.dtypes import refuse_dtypes
from laser_fast.nn.evaluation_mode import draws_dropout
from laser_fast.nn.mformer import MFormer
from laser_fast.nn.prefixes import DeepPrefix, LinearPrefix
from laser_fast.nn.text_residual import TextResidual, identity_map
from laser_fast.ops import Routing
from laser_fast.ops.host_copies import to_device
from laser_fast.ops.precision import autocast_dtype
from laser_fast.recommenders.protocol import FrozenRecommender, SequentialRecommender

Self = TypeVar("Self", bound="LaserNetwork")


class LaserNetwork(VersionedModule):
    """Embeddings of users and items by one language model, and the loss of a batch.

    `state_dict` holds the trained parameters and nothing of the frozen models.

    Args:
        bituning: suffix, shared prefix and read-out.
        mformer, linear_prefix: one of them may write the prefix; else it is the shared one of `bituning`, if any.
        recommender: gives the states that `mformer` or `linear_prefix` reads.
        deep_prefix: makes keys and values of every layer from the prefix (`prefix_mode="kv"`); None = the prefix enters
            as input embeddings.
        reuse_instruction: compute keys and values of an instruction before the prefix once and inject them; needs a
            causal language model.
        head: "linear" (trained, starts as the identity, shared by both sides) or "none".
        dropout: on the read-out.
        text: the text residual; None = the embeddings are the read-out alone, as in the paper.
        item_side: with `text`, whether the language model reads items too ("lm") or not ("text").
        item_counts: int64 [I], training events of each item; adds a trained popularity weight to the scores.

    Attributes:
        lm_weights: the version of the weights of the language model alone.
    """

    log_counts: Tensor

    def __init__(
        self,
        lm: FrozenLM,
        bituning: BiTuning,
        num_items: int,
        *,
        mformer: MFormer | None = None,
        linear_prefix: LinearPrefix | None = None,
        recommender: SequentialRecommender | None = None,
        deep_prefix: DeepPrefix | None = None,
        reuse_instruction: bool = False,
        head: str = "linear",
        objective: Objective | None = None,
        dropout: float = 0.0,
        text: TextResidual | None = None,
        item_side: str = "lm",
        item_counts: Tensor | None = None,
    ) -> None:
        super().__init__()
        if item_side not in ("lm", "text") or (item_side == "text" and text is None):
            raise ValueError(f'LaserNetwork: item_side must be "lm", or "text" where there is text, got {item_side!r}')
        _check_prefix(mformer, linear_prefix, recommender, num_items)
        if reuse_instruction and not lm.causal:
            raise ValueError(
                "LaserNetwork: reuse_instruction must be false for a bidirectional language model, whose instruction "
                "would otherwise not see the text behind it, got true"
            )
        if head not in ("linear", "none"):
            raise ValueError(f'LaserNetwork: head must be "linear" or "none", got {head!r}')
        self.lm = lm
        self.bituning = bituning
        self.num_items = num_items
        self.mformer = mformer
        self.linear_prefix = linear_prefix
        self.deep_prefix = deep_prefix
        self.reuse_instruction = reuse_instruction
        self.recommender = None if recommender is None else FrozenRecommender(recommender)
        self.head = identity_map(lm.hidden_size) if head == "linear" else None
        self.objective = objective or Objective()
        self.dropout = dropout
        self.text = text
        self.item_side = item_side
        self.popularity_weight: nn.Parameter | None = None
        if item_counts is not None:
            self.popularity_weight = nn.Parameter(torch.zeros(()))
            self.register_buffer("log_counts", torch.log1p(item_counts.float()), persistent=False)
        self.lm_weights = WeightsVersion(lm.model)
        if text is not None:
            text.source_version = self.lm_weights.now
        self._instructions: dict[tuple[tuple[int, ...], torch.dtype | None], tuple[int, KeyValuePrefix]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the trained parameters."""
        return self.bituning.suffix_tokens.device

    def encode(self, batch: PackedBatch) -> tuple[Tensor, Routing | None]:
        """Embeddings of the users or items of a batch, with gradient: float32 [B, d], and the routing."""
        tokens, injected, routing = self.write_prefix(batch)
        return self._encode_behind(batch, tokens, injected), routing

    def _encode_behind(self, batch: PackedBatch, prefix: Tensor | None, injected: KeyValuePrefix | None) -> Tensor:
        packed = self.bituning.assemble(prefix, self.lm.embed(batch.input_ids), batch.token_cu_seqlens)
        if self.bituning.readout == "suffix":
            state = self.lm(packed.inputs_embeds, packed.cu_seqlens, injected, last_only=True).float()
        else:
            state = self.bituning.read_out(self.lm(packed.inputs_embeds, packed.cu_seqlens, injected), packed)
        if self.text is not None:
            state = F.normalize(state, dim=-1)  # beside a unit vector
        embedding = F.dropout(state, self.dropout, draws_dropout(self))
        if self.head is not None:
            embedding = self.head(embedding)
        if self.text is not None:
            embedding = embedding + self.encode_texts(batch)
        return embedding.float()  # under autocast the head gives half precision

    def encode_texts(self, batch: PackedBatch) -> Tensor:
        """The text residual of the users or items of a batch, with gradient: float32 [B, d]."""
        if self.text is None or batch.text_items is None or batch.text_cu_seqlens is None:
            raise ValueError("LaserNetwork: encode_texts needs a text residual and a batch made for it, got none")
        return self.text.users(batch.text_items, batch.text_cu_seqlens)

    def virtual_tokens(self, batch: PackedBatch) -> int:
        """Tokens of the language model beside the text of each sequence of a batch."""
        tokens = len(self.bituning.suffix_tokens) + (0 if self.reuse_instruction else len(batch.instruction or ()))
        if self.deep_prefix is not None:
            return tokens
        if self.mformer is not None:
            return tokens + self.mformer.query_experts.shape[1]
        if self.linear_prefix is not None:
            return tokens + self.linear_prefix.num_tokens
        return tokens if self.bituning.prefix_tokens is None else tokens + len(self.bituning.prefix_tokens)

    def write_prefix(self, batch: PackedBatch) -> tuple[Tensor | None, KeyValuePrefix | None, Routing | None]:
        """What precedes the text: input embeddings [B, Q, D_llm], keys and values, and the routing."""
        tokens, routing = self.bituning.shared_prefix(1 if self.deep_prefix is not None else len(batch)), None
        if self.mformer is not None:
            written = self.mformer(self._states(batch), batch.cu_seqlens)
            tokens, routing = written.queries if self.deep_prefix is not None else written.prefix, written.routing
        elif self.linear_prefix is not None:
            tokens = self.linear_prefix(self._states(batch), batch.cu_seqlens)
        injected = None
        if self.deep_prefix is not None:
            assert tokens is not None
            injected, tokens = self.deep_prefix(tokens), None
        if not batch.instruction:
            return tokens, injected, routing
        if self.reuse_instruction:
            instruction = self._instruction(batch.instruction)
            return tokens, instruction if injected is None else instruction.then(injected), routing
        if injected is not None:
            raise ValueError(
                "LaserNetwork: reuse_instruction must be true where an instruction stands before a deep prefix, got "
                "false"
            )
        words = self._embed_words(batch.instruction).expand(len(batch), -1, -1)
        return words if tokens is None else torch.cat([words, tokens.to(words.dtype)], dim=1), None, routing

    def write_keys_and_values(self, batch: PackedBatch) -> KeyValuePrefix:
        """Instruction and prefix of a batch as keys and values of every layer; the model must have a prefix."""
        tokens, injected, _ = self.write_prefix(batch)
        if tokens is not None:
            run = self.lm.key_values(tokens, injected)
            injected = run if injected is None else injected.then(run)
        assert injected is not None
        return injected

    def _states(self, batch: PackedBatch) -> Tensor:
        assert self.recommender is not None
        return self.recommender.states(batch.items, batch.cu_seqlens, batch.folds)

    @torch.no_grad()
    def _instruction(self, input_ids: tuple[int, ...]) -> KeyValuePrefix:
        """Keys and values of the instruction, computed once: nothing before it is trained."""
        version, name = self.lm_weights.now(), (input_ids, autocast_dtype(self.device))
        made_at, known = self._instructions.get(name, (None, None))
        if known is None or made_at != version:
            with torch.inference_mode(False):  # the result may enter a training step
                known = self.lm.key_values(self._embed_words(input_ids))
            self._instructions[name] = version, known  # concurrent threads make the same
        return known

    def _embed_words(self, input_ids: tuple[int, ...]) -> Tensor:
        return self.lm.embed(to_device(torch.tensor(input_ids), self.device))[None]

    def forward(self, batch: PackedBatch, return_loss: bool = True, step: StepContext | None = None) -> LaserOutput:
        """Loss of a batch of users, see `Objective`.

        Args:
            batch: users with targets, on any device.
            return_loss: not read; its presence tells transformers' Trainer that there is a loss to evaluate.
            step: None = `StepContext()`.

        Raises:
            ValueError: no targets, or no negatives for "sampled".
            RuntimeError: no item matrix where V takes part.
        """
        if batch.targets is None:
            raise ValueError("LaserNetwork: the batch must have targets, got None; build it with training_batch")
        step = step or StepContext()
        batch = on_device(batch, self.device)
        users, routing = self.encode(batch)
        live = None
        if batch.positives is not None:
            texts_only = self.item_side == "text"
            live = self.encode_texts(batch.positives) if texts_only else self.encode(batch.positives)[0]
        step = replace(step, popularity=self.popularity())
        if self.item_side == "text" and self.text is not None and step.items_train:
            step = replace(step, item_matrix=self.text.items)
        return self.objective(batch, users, live, routing, step)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the layers of the language model again in backward: `execution.checkpointing` "full".

        `TrainingArguments(gradient_checkpointing=True)` calls this or, in older releases of transformers,
        `gradient_checkpointing_enable`.

        Args:
            activation_checkpointing_kwargs: may hold `use_reentrant`, which changes neither loss nor gradient.
            every_n_layers: must be 1.
            offload: keep the inputs of the layers in host memory meanwhile ("offload").

        Raises:
            ValueError: another option, or layers that transformers does not mark as such.
            RuntimeError: the layers are compiled.
        """
        others = dict(activation_checkpointing_kwargs or {})
        others.pop("use_reentrant", None)
        if every_n_layers != 1:
            others["every_n_layers"] = every_n_layers
        if others:
            raise ValueError(
                f"activation_checkpointing_enable: use_reentrant and offload alone are known, got {others}; leave the "
                "others out"
            )
        self._checkpoint("offload" if offload else "full")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for backward: `execution.checkpointing` "none"."""
        self._checkpoint("none")

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether backward computes parts of the language model again."""
        return self.lm.execution.checkpointing != "none"

    def _checkpoint(self, how: str) -> None:
        self.lm.run_as(replace(self.lm.execution, checkpointing=how))

    def popularity(self) -> tuple[Tensor, Tensor] | None:
        """The trained weight [] and log(1 + count) [I], where popularity is part of the loss."""
        return None if self.popularity_weight is None else (self.popularity_weight, self.log_counts)

    def _all_versions(self) -> tuple[WeightsVersion, ...]:
        return self.weights, self.lm_weights

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, but not to another dtype: trained parameters stay float32, frozen ones as loaded."""
        refuse_dtypes(
            self,
            fn,
            "choose the dtype of the frozen language model where it is loaded (dtype=), and compute in half precision "
            "under torch.autocast (of TrainingArguments: bf16, not bf16_full_eval)",
        )
        super()._apply(fn, recurse)
        self._instructions.clear()
        return self


def _check_prefix(
    mformer: MFormer | None, linear_prefix: LinearPrefix | None, recommender: SequentialRecommender | None, size: int
) -> None:
    if mformer is not None and linear_prefix is not None:
        raise ValueError("LaserNetwork: linear_prefix must be None with mformer (one of them writes), got both")
    if recommender is None and (mformer is not None or linear_prefix is not None):
        writer = "mformer" if mformer is not None else "linear_prefix"
        raise ValueError(f"LaserNetwork: recommender must be given with {writer} (it reads its states), got None")
    if recommender is not None and recommender.num_items != size:
        raise ValueError(
            f"LaserNetwork: the recommender must know the {size} items of the catalogue, got {recommender.num_items}"
        )
