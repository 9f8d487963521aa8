"""The forms of a training step: each computes what `LaserModel` computes, and runs as many tokens as it says."""

from collections.abc import Iterator

import bench_step
import pytest
import steps
import torch
from baselines.authors_step import NEGATIVES, AuthorsStep, AuthorsWorkload, padded_list
from baselines.padded_step import PaddedStep, pad, with_checkpointing
from baselines.peft_prompt import PeftPromptStep
from torch import Tensor, nn
from transformers import PreTrainedModel

from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel

CPU = torch.device("cpu")
SHAPE = steps.StepShape("amazon-scientific", users=3, queries=4, experts=4, width=16, layers=2, heads=2, state_size=8)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(prefix: str = "mformer", quantization: str = "none") -> tuple[LaserModel, PreTrainedModel, PackedBatch]:
    """Ours, a twin of its frozen model, and a batch with positives."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    language_model = steps.frozen_model("llama-tiny", CPU, quantization=quantization)
    padded = steps.twin(language_model)
    model = steps.build_laser(language_model, SHAPE, prefix=prefix)
    return model, padded, steps.user_batch(model, SHAPE, with_positives=True)


def named_gradients(run_result: object, parameters: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    assert isinstance(run_result, tuple)
    for parameter, grad in zip(parameters, run_result, strict=True):
        assert grad is not None
        yield parameter, grad


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_padded_form(checkpointed: bool, quantization: str) -> None:
    model, padded, batch = build(quantization=quantization)
    batch = steps.users_alone(batch)
    form = PaddedStep(model, with_checkpointing(padded) if checkpointed else padded, batch)
    torch.testing.assert_close(form.encode()[0], model.encode(batch)[0], **CLOSE)
    ours = steps.our_step(model, batch)()
    assert isinstance(ours, tuple) and len(ours) > 10
    for (_, grad), expected in zip(named_gradients(form(), form.parameters), ours, strict=True):
        torch.testing.assert_close(grad, expected, **CLOSE)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_peft_form(checkpointed: bool, quantization: str) -> None:
    pytest.importorskip("peft")
    model, padded, batch = build("shared", quantization)
    batch = steps.users_alone(batch)
    form = PeftPromptStep(model, with_checkpointing(padded) if checkpointed else padded, batch)
    assert padded.training  # else its checkpointing would not act
    torch.testing.assert_close(form.encode()[0], model.encode(batch)[0], **CLOSE)
    prompt, suffix = (grad for _, grad in named_gradients(form(), form.parameters))
    wanted = [model.bituning.prefix_tokens, model.bituning.suffix_tokens]
    expected = steps.gradients(model(batch).loss, wanted)
    torch.testing.assert_close((prompt, suffix), expected, **CLOSE)


def test_checkpointing_keeps_less() -> None:
    """Hugging Face's checkpointing acts: fewer bytes are kept for backward."""

    def kept_bytes(checkpointed: bool) -> int:
        model, padded, batch = build()
        form = PaddedStep(model, with_checkpointing(padded) if checkpointed else padded, steps.users_alone(batch))
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.nbytes), x)[1], lambda x: x):
            form.encode()
        return sum(kept)

    assert kept_bytes(True) < 0.7 * kept_bytes(False)


@pytest.fixture
def authors() -> tuple[LaserModel, AuthorsStep, AuthorsWorkload]:
    model, padded, _ = build()
    return model, AuthorsStep(model, padded), AuthorsWorkload(model, SHAPE)


Authors = tuple[LaserModel, AuthorsStep, AuthorsWorkload]


def test_authors_form_against_lists(authors: Authors) -> None:
    model, form, work = authors
    bench_step.assert_same(model, form, work)
    cross_entropy, _ = form.loss_against_lists(work.padded_users, work.padded_labels, work.padded_negatives)
    expected, _ = work.same_loss(model)
    torch.testing.assert_close(cross_entropy, expected, **CLOSE)
    _assert_gradients(model, form, cross_entropy, expected)


def test_authors_form_against_the_item_matrix(authors: Authors) -> None:
    model, form, work = authors
    batch = steps.users_alone(work.users)
    assert batch.targets is not None
    losses = form.loss_against_matrix(work.padded_users, model.item_matrix, batch.targets)
    ours = model(batch)
    torch.testing.assert_close(losses, (ours.cross_entropy, ours.balance_loss), **CLOSE)
    _assert_gradients(model, form, losses[0] + model.objective.balance_weight * losses[1], ours.loss)


def _assert_gradients(model: LaserModel, form: AuthorsStep, theirs: Tensor, ours: Tensor) -> None:
    """Of every trained tensor; their experts are parameters of their own."""
    assert model.mformer is not None
    experts, count = model.mformer.query_experts, len(form.experts)
    others, suffix = form.parameters[: -count - 1], form.parameters[-1]
    found = steps.gradients(theirs, form.parameters)
    expected = steps.gradients(ours, [*others, experts, suffix])
    torch.testing.assert_close(found[: len(others)], expected[: len(others)], **CLOSE)
    torch.testing.assert_close(found[-1], expected[-1], **CLOSE)
    slabs = [torch.zeros(experts[:1].shape) if slab is None else slab for slab in found[len(others) : -1]]
    torch.testing.assert_close(torch.cat(slabs), expected[-2], **CLOSE)


def test_authors_lists_are_encoded_one_at_a_time(authors: Authors) -> None:
    _, form, work = authors
    with steps.counted_tokens(form.language_model) as counts:
        form.loss_against_lists(work.padded_users, work.padded_labels, work.padded_negatives)
    assert len(counts) == SHAPE.users + 2
    virtual = SHAPE.queries + 1
    longest = [max(work.users.token_cu_seqlens.diff().tolist())]
    lists = [work.padded_labels, *work.padded_negatives]
    assert counts == [
        rows * (columns + virtual)
        for rows, columns in [(SHAPE.users, longest[0]), *(tuple(texts.input_ids.shape) for texts in lists)]
    ]
    assert [len(texts.input_ids) for texts in lists] == [SHAPE.users] + [NEGATIVES] * SHAPE.users


def test_tokens_of_either_form() -> None:
    model, padded, batch = build()
    users = steps.users_alone(batch)
    lengths = users.token_cu_seqlens.diff()
    assert steps.language_model_tokens(model, users) == int(lengths.sum()) + 3 * (4 + 1)
    assert model.lm.first_position == 0  # found with calls of its own, which are not counted
    with steps.counted_tokens(padded) as of_padded, steps.counted_tokens(model.lm.model) as of_ours:
        PaddedStep(model, padded, users).encode()
        model.encode(users)
    assert of_ours == [steps.language_model_tokens(model, users)]
    assert of_padded == [3 * (int(lengths.max()) + 4 + 1)]
    shared, _, _ = build("shared")
    assert steps.language_model_tokens(shared, users) == of_ours[0]


def test_padding() -> None:
    model, _, batch = build()
    texts = pad(batch)
    assert texts.input_ids.shape == (3, int(texts.lengths.max()) + 1)
    left = padded_list(model, batch)
    for row, ids in enumerate(batch.input_ids.split(texts.lengths.tolist())):
        assert torch.equal(texts.input_ids[row, : len(ids)], ids)
        assert torch.equal(left.input_ids[row, -len(ids) :], ids) and int(left.text_mask[row].sum()) == len(ids)


def test_a_twin_has_the_same_weights_and_its_own_settings() -> None:
    language_model = steps.frozen_model("llama-tiny", CPU)
    other = steps.twin(language_model)
    assert {id(p) for p in other.parameters()} == {id(p) for p in language_model.parameters()}
    steps.build_laser(language_model, SHAPE)
    assert language_model.config._attn_implementation == "laser_varlen"
    assert other.config._attn_implementation == "sdpa"


def test_every_linear_layer_is_packed() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = steps.frozen_model("llama-tiny", CPU, quantization="nf4")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 14
    for linear in linears:
        assert isinstance(linear, bitsandbytes.nn.Linear4bit) and linear.weight.dtype == torch.uint8
        assert linear.weight.quant_state.quant_type == "nf4" and linear.weight.quant_state.nested


def test_drawing_changes_no_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(1), expected)
