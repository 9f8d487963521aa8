"""Laser: a frozen language model as a sequential recommender, with M-Former's prefix and a suffix around the text."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.data.sequences import PackedSequences
from laser_fast.laser.derived_state import DerivedState
from laser_fast.laser.kept_prefixes import KeptPrefixes
from laser_fast.laser.pretrained import PretrainedLaser
from laser_fast.laser.recommending import RecommendingLaser
from laser_fast.laser.serving import Serving
from laser_fast.laser.trainer_calls import TrainerCalls
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix
from laser_fast.models.device_batches import on_device
from laser_fast.models.objective import LaserOutput as LaserOutput
from laser_fast.models.objective import Objective
from laser_fast.models.token_budget import TokenBudget
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.evaluation_mode import draws_dropout, evaluating
from laser_fast.nn.mformer import MFormer
from laser_fast.nn.prefixes import DeepPrefix, LinearPrefix
from laser_fast.nn.text_residual import TextResidual
from laser_fast.ops import Routing
from laser_fast.ops.host_copies import to_device
from laser_fast.ops.precision import autocast_dtype
from laser_fast.processes import ALONE
from laser_fast.recommenders.protocol import FrozenRecommender, SequentialRecommender
from laser_fast.retrieval.requests import Recommendation as Recommendation


class LaserModel(RecommendingLaser, PretrainedLaser, TrainerCalls, DerivedState):
    """The recommender of the paper; both sides, users and items, go through the same frozen language model.

    `state_dict` holds what is trained and nothing of the frozen models. It is a `Scorer`: `score` is the cosine of
    user and item embeddings over the temperature.

    Args:
        lm: the frozen language model.
        builder: texts, prompts and catalogue; turns histories into packed batches.
        item_ids: external ids in index order.
        bituning: suffix, shared prefix and read-out.
        mformer: writes the prefix; None = `linear_prefix`, or the shared prefix of `bituning`, or none.
        linear_prefix: writes it in place of M-Former.
        deep_prefix: makes keys and values of every layer from the prefix (`prefix_mode="kv"`); None = the prefix enters
            as input embeddings.
        reuse_instruction: where a batch has an instruction in front of its prefix, compute its keys and values once
            and inject them; needs a causal language model.
        recommender: whose states the writer of the prefix reads; needed with `mformer` and `linear_prefix`.
        head: "linear" (trained, starts as the identity, one for both sides) or "none".
        temperature: tau.
        balance_weight: alpha.
        candidates: what a user's target stands against in training, "catalog" or "sampled"; see `Objective`.
        dropout: on the read-out.
        text: the text residual; None = the paper, whose embeddings are the language model's read-out alone.
        mask_history, item_counts: see `Objective`; counts int64 [I] add a trained popularity weight to its scores.
        item_side: with `text`, whether items are read by the language model too ("lm") or not ("text").

    Attributes:
        item_matrix_trains: with `item_side` "text", whether users are trained against the items as the head makes them
            at every step, with gradient, or against `item_matrix` as it is.
        budget: packed tokens that `encode_users` and `encode_items` put through the language model at once; no limit
            unless one is set.
        serving: compiles the language model or captures it in CUDA graphs for requests, where it is told to.
        processes, balance_processes: see `Objective`; none but this one unless training sets them.
    """

    log_counts: Tensor

    def __init__(
        self,
        lm: FrozenLM,
        builder: BatchBuilder,
        item_ids: Sequence[str],
        bituning: BiTuning,
        *,
        mformer: MFormer | None = None,
        linear_prefix: LinearPrefix | None = None,
        recommender: SequentialRecommender | None = None,
        deep_prefix: DeepPrefix | None = None,
        reuse_instruction: bool = False,
        head: str = "linear",
        temperature: float = 0.05,
        balance_weight: float = 0.01,
        candidates: str = "catalog",
        dropout: float = 0.0,
        text: TextResidual | None = None,
        item_side: str = "lm",
        mask_history: bool = False,
        item_counts: Tensor | None = None,
    ) -> None:
        super().__init__(lm, builder.num_items)
        if item_side not in ("lm", "text") or (item_side == "text" and text is None):
            raise ValueError(f'LaserModel: item_side must be "lm", or "text" where there is text, got {item_side!r}')
        if len(item_ids) != builder.num_items:
            raise ValueError(
                f"LaserModel: item_ids must name the {builder.num_items} items of the catalogue, got {len(item_ids)}"
            )
        if mformer is not None and linear_prefix is not None:
            raise ValueError("LaserModel: linear_prefix must be None with mformer (one of them writes), got both")
        if recommender is None and (mformer is not None or linear_prefix is not None):
            writer = "mformer" if mformer is not None else "linear_prefix"
            raise ValueError(f"LaserModel: recommender must be given with {writer} (it reads its states), got None")
        if recommender is not None and recommender.num_items != builder.num_items:
            raise ValueError(
                f"LaserModel: the recommender must know the {builder.num_items} items of the catalogue, "
                f"got {recommender.num_items}"
            )
        if reuse_instruction and not lm.causal:
            raise ValueError(
                "LaserModel: reuse_instruction must be false for a bidirectional language model, whose instruction "
                "would otherwise not see the text behind it, got true"
            )
        self.lm = lm
        self.builder = builder
        self.bituning = bituning
        self.mformer = mformer
        self.linear_prefix = linear_prefix
        self.deep_prefix = deep_prefix
        self.reuse_instruction = reuse_instruction
        self.recommender = None if recommender is None else FrozenRecommender(recommender)
        self.head: nn.Linear | None = None
        if head == "linear":
            self.head = nn.Linear(lm.hidden_size, lm.hidden_size)
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        elif head != "none":
            raise ValueError(f'LaserModel: head must be "linear" or "none", got {head!r}')
        self.temperature = temperature
        self.balance_weight = balance_weight
        self.candidates = candidates
        Objective(temperature, balance_weight, candidates)  # refuses what it does not know
        self.dropout = dropout
        self.text = text
        self.item_side = item_side
        self.mask_history = mask_history
        self.popularity_weight: nn.Parameter | None = None
        if item_counts is not None:
            self.popularity_weight = nn.Parameter(torch.zeros(()))
            self.register_buffer("log_counts", torch.log1p(item_counts.float()), persistent=False)
        self.item_matrix_trains = True
        self.item_ids = list(item_ids)
        self.index_of_item = {item_id: index for index, item_id in enumerate(self.item_ids)}
        self.budget = TokenBudget()
        self.serving = Serving(self)
        self.processes = self.balance_processes = ALONE

    @property
    def device(self) -> torch.device:
        """Where the trained parameters live."""
        return self.bituning.suffix_tokens.device

    def encode(self, batch: PackedBatch) -> tuple[Tensor, Routing | None]:
        """Embeddings of the sequences of a batch, users or items, with gradient: float32 [B, d], and the routing."""
        return self._encode_behind(batch, *self.write_prefix(batch))

    def _encode_behind(
        self, batch: PackedBatch, prefix: Tensor | None, injected: KeyValuePrefix | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        packed = self.bituning.assemble(prefix, self.lm.embed(batch.input_ids), batch.token_cu_seqlens)
        if self.bituning.readout == "suffix":
            state = self.lm(packed.inputs_embeds, packed.cu_seqlens, injected, last_only=True).float()
        else:
            state = self.bituning.read_out(self.lm(packed.inputs_embeds, packed.cu_seqlens, injected), packed)
        if self.text is not None:
            state = F.normalize(state, dim=-1)  # beside a unit vector
        embedding = F.dropout(state, self.dropout, draws_dropout(self))
        embedding = embedding if self.head is None else self.head(embedding)
        embedding = embedding if self.text is None else embedding + self.encode_texts(batch)
        return embedding.float(), routing  # under autocast the head gives less

    def encode_texts(self, batch: PackedBatch) -> Tensor:
        """The text residual of the sequences of a batch, with gradient into it: float32 [B, d].

        Raises:
            ValueError: there is no residual, or the batch has no histories for it.
        """
        if self.text is None or batch.text_items is None or batch.text_cu_seqlens is None:
            raise ValueError("LaserModel: encode_texts needs a text residual and a batch made for it, got none")
        return self.text.users(batch.text_items, batch.text_cu_seqlens)

    def virtual_tokens(self, batch: PackedBatch) -> int:
        """Tokens that stand beside the text of every sequence of a batch in the language model."""
        tokens = self.bituning.suffix_tokens.shape[0]
        if self.deep_prefix is None and self.mformer is not None:
            tokens += self.mformer.query_experts.shape[1]
        elif self.deep_prefix is None and self.linear_prefix is not None:
            tokens += self.linear_prefix.num_tokens
        elif self.deep_prefix is None and self.bituning.prefix_tokens is not None:
            tokens += self.bituning.prefix_tokens.shape[0]
        return tokens if self.reuse_instruction else tokens + len(batch.instruction or ())

    def write_prefix(self, batch: PackedBatch) -> tuple[Tensor | None, KeyValuePrefix | None, Routing | None]:
        """What stands in front of the text: input embeddings [B, Q, D_llm], keys and values, and the routing."""
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
                "LaserModel: reuse_instruction must be true where an instruction stands before a deep prefix, got false"
            )
        words = self._embed_words(batch.instruction).expand(len(batch), -1, -1)
        return words if tokens is None else torch.cat([words, tokens.to(words.dtype)], dim=1), None, routing

    def _states(self, batch: PackedBatch) -> Tensor:
        assert self.recommender is not None
        return self.recommender.states(batch.items, batch.cu_seqlens, batch.folds)

    @torch.no_grad()
    def _instruction(self, input_ids: tuple[int, ...]) -> KeyValuePrefix:
        """Keys and values of the instruction, computed once: nothing in front of it is trained."""
        version, name = self.lm_weights.now(), (input_ids, autocast_dtype(self.device))
        made_at, known = self._instructions.get(name, (None, None))
        if known is None or made_at != version:
            with torch.inference_mode(False):  # the result outlives this call and may enter a training step
                known = self.lm.key_values(self._embed_words(input_ids))
            self._instructions[name] = version, known  # threads that come together make the same
        return known

    def _embed_words(self, input_ids: tuple[int, ...]) -> Tensor:
        return self.lm.embed(to_device(torch.tensor(input_ids), self.device))[None]

    def keep_prefixes(self, capacity: int) -> None:
        """Serve users who come back unchanged without M-Former and the model's pass over their prefix.

        Their prefixes go into `kept_prefixes` (see `KeptPrefixes`), which `encode_users`, `score` and `recommend` use.

        Args:
            capacity: users kept; 0 stops it.

        Raises:
            ValueError: a negative capacity, no prefix at all, or input embeddings as prefix of a bidirectional language
                model.
        """
        self.kept_prefixes = KeptPrefixes(self, capacity) if capacity else None

    def forward(self, batch: PackedBatch, return_loss: bool = True) -> LaserOutput:
        """Training loss of a batch of users: among their candidates (see `Objective`), plus the balance of the router.

            loss = CE(users, V) + CE(users, live) + alpha * L_balance            candidates "catalog"
            loss = CE(users, target and own negatives) + alpha * L_balance       candidates "sampled"

        V is a constant of the epoch: with gradient, and with it alone, it may be of older weights. Live candidates are
        there when the batch brings its positives: they are encoded here with gradient and stand against each other
        only. (Put in the place of their rows of V they would be the only fresh rows among stale ones, and to tell fresh
        from stale is easier than to recommend: on MovieLens-100K the cross-entropy over 1,682 items fell below 4 within
        32 steps, to the log of the batch's 60 positives, while validation hardly moved.)

        Args:
            batch: of users with targets, on any device.
            return_loss: always; transformers' Trainer reads here that there is a loss to evaluate.

        Raises:
            ValueError: a batch without targets, or without the negatives that "sampled" needs.
            RuntimeError: no item matrix yet (`refresh_items`), where it is needed; without gradient also one of older
                weights.
        """
        if batch.targets is None:
            raise ValueError("LaserModel: the batch must have targets, got None; build it with training_batch")
        batch = on_device(batch, self.device)
        users, routing = self.encode(batch)
        live = None if batch.positives is None else self._encode_live(batch.positives)
        together = self.processes, self.balance_processes
        objective = Objective(
            self.temperature, self.balance_weight, self.candidates, *together, self.mask_history, self.popularity()
        )
        return objective(batch, users, live, routing, self._candidates)

    def popularity(self) -> tuple[Tensor, Tensor] | None:
        """The trained weight [] and log(1 + count) [I], where popularity is part of what is minimised."""
        return None if self.popularity_weight is None else (self.popularity_weight, self.log_counts)

    def _encode_live(self, batch: PackedBatch) -> Tensor:
        return self.encode_texts(batch) if self.item_side == "text" else self.encode(batch)[0]

    def _candidates(self) -> Tensor:
        """V as training sees it."""
        trains = self.item_side == "text" and self.item_matrix_trains
        if trains and self.text is not None:
            return self.text.items()
        return self._any_items() if torch.is_grad_enabled() else self.current_items()

    @torch.inference_mode()
    def encode_users(self, histories: PackedSequences, *, batch_size: int = 128) -> Tensor:
        """Embeddings of users from their histories: float32 [B, d], on the model's device, without gradient."""
        rows = [
            self._encode_now(
                self.builder.histories(histories.select(np.arange(start, min(start + batch_size, len(histories))))),
                self.kept_prefixes,
            )
            for start in range(0, len(histories), batch_size)
        ]
        return torch.cat(rows) if rows else torch.empty(0, self.lm.hidden_size, device=self.device)

    @torch.inference_mode()
    def encode_items(
        self, indices: Sequence[int] | None = None, *, batch_size: int = 256, progress: bool = False
    ) -> Tensor:
        """Embeddings of items, the whole catalogue by default: float32 [n, d], without gradient."""
        wanted = np.arange(self.num_items) if indices is None else np.asarray(indices, dtype=np.int64)
        if self.item_side == "text" and self.text is not None:
            return self.text.embeddings()[torch.from_numpy(wanted).to(self.device)].float()
        starts = tqdm(
            range(0, len(wanted), batch_size), desc="encode items", unit="batch", disable=not progress, leave=False
        )
        rows = [self._encode_now(self.builder.items(wanted[start : start + batch_size])) for start in starts]
        return torch.cat(rows) if rows else torch.empty(0, self.lm.hidden_size, device=self.device)

    def refresh_items(self, *, batch_size: int = 256, progress: bool = False) -> Tensor:
        """Encode the catalogue with the current parameters and keep it as the item matrix V: float32 [I, d].

        Whoever answers meanwhile does it with the matrix of before, where that belongs to the weights of now.
        """
        if self.text is not None:
            self.text.refresh_vectors()
        version = self.weights.now()
        matrix = self.encode_items(batch_size=batch_size, progress=progress).clone()  # leave inference mode
        self.item_matrix = matrix
        self._items_belong_to = version  # weights that changed meanwhile leave it outdated
        return matrix

    def _encode_now(self, batch: PackedBatch, kept: KeptPrefixes | None = None) -> Tensor:
        """Encode as in evaluation mode, within the budget; the mode stays as it is."""
        if self.lm.model.training:
            raise RuntimeError(
                "LaserModel: the language model must be in evaluation mode to answer, got training; "
                "call lm.freeze() first"
            )
        with evaluating():
            return self.budget.encode(batch, self.virtual_tokens, lambda part: self._encode_part(part, kept))

    def _encode_part(self, batch: PackedBatch, kept: KeptPrefixes | None) -> Tensor:
        batch = on_device(batch, self.device)
        if kept is None or not len(batch):
            return self.encode(batch)[0]
        with kept.of(batch) as prefix:
            return self._encode_behind(batch, None, prefix, None)[0]
