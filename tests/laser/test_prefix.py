"""LaserModel's ways to put words and prefix in front of the text: equal results, gradients, and prefixes kept."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import PackedSequences, training_rows
from laser_fast.laser import LaserModel
from laser_fast.laser.build import Inputs
from laser_fast.lm.execution.cuda_graphs import Recorder
from laser_fast.lm.execution.fixed_shapes import FixedShapes
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.packed_layout import PackedLayout

HISTORIES = [[0, 1, 2], [7], [], [3, 4, 5, 6, 8, 9]]
WRITERS = {"mformer": "mformer.query_experts", "linear": "linear_prefix.weight", "shared": "bituning.prefix_tokens"}
PROMPT = {"user_template": "red blue green : {history} , saw"}


@pytest.fixture
def build(make_laser: Callable[..., Any]) -> Callable[..., tuple[LaserModel, Inputs]]:
    def make(
        *, causal: bool = True, prompt: dict[str, Any] | None = None, **sections: Any
    ) -> tuple[LaserModel, Inputs]:
        return make_laser("llama" if causal else "bert", prompt=PROMPT | (prompt or {}), **sections)

    return make


def embeddings(model: LaserModel) -> tuple[Tensor, Tensor]:
    return model.encode_users(PackedSequences.from_lists(HISTORIES)), model.encode_items()


def losses(model: LaserModel, inputs: Inputs, steps: int = 4) -> list[float]:
    """Of a few training steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.refresh_items()
    model.eval()  # no dropout, so that two ways to compute the same can be compared
    rows = training_rows(inputs.split.train, 4)
    found = []
    for step in range(steps):
        batch = model.builder.training_batch(rows.select(np.arange(step * 8, step * 8 + 8)), with_positives=True)
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("readout", ["suffix", "mean"])
@pytest.mark.parametrize("prefix", ["mformer", "linear", "shared", "none"])
def test_an_instruction_computed_once_changes_nothing(
    build: Callable[..., Any], tokens_seen: Callable[[Any], list[int]], prefix: str, readout: str
) -> None:
    bituning = {"prefix": prefix, "readout": readout}
    results = []
    for reuse in (False, True):
        order = {"order": "prompt-first", "reuse_instruction": reuse}
        model, inputs = build(bituning=bituning, prompt=order)
        tokens = tokens_seen(model)
        users, items = embeddings(model)
        results.append((users, items, losses(model, inputs), sum(tokens)))
    (users, items, steps, tokens), (users_again, items_again, steps_again, fewer) = results
    torch.testing.assert_close(users_again, users, rtol=0, atol=1e-6)
    torch.testing.assert_close(items_again, items, rtol=0, atol=1e-6)
    assert steps_again == pytest.approx(steps, rel=1e-5)
    assert fewer < tokens


def test_the_order_matters_to_a_decoder(build: Callable[..., Any]) -> None:
    prefix_first, _ = build()
    prompt_first, _ = build(prompt={"order": "prompt-first"})
    one, other = embeddings(prefix_first)[0], embeddings(prompt_first)[0]
    assert float((one - other).abs().max()) > 1e-2 * float(one.abs().max())


def test_an_encoder_takes_either_order_but_no_reuse(build: Callable[..., Any]) -> None:
    order = {"order": "prompt-first", "reuse_instruction": False}
    model, inputs = build(causal=False, prompt=order)
    assert all(np.isfinite(losses(model, inputs, steps=2)))
    with pytest.raises(ValueError, match="reuse_instruction must be false for a bidirectional language model"):
        build(causal=False, prompt={"order": "prompt-first"})


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("prefix", WRITERS)
def test_a_deep_prefix_is_trained_and_costs_no_token(
    build: Callable[..., Any], tokens_seen: Callable[[Any], list[int]], prefix: str, causal: bool
) -> None:
    model, inputs = build(causal=causal, bituning={"prefix": prefix, "prefix_mode": "kv"})
    lengths = tokens_seen(model)
    histories = PackedSequences.from_lists(HISTORIES)
    model.encode_users(histories)
    text = model.builder.histories(histories).input_ids.shape[0]
    assert lengths == [text + len(HISTORIES)]  # one suffix each, no prefix
    model.refresh_items()
    rows = training_rows(inputs.split.train, 4).select(np.arange(8))
    model.train()(model.builder.training_batch(rows, with_positives=True)).loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert {"deep_prefix.down.weight", "deep_prefix.up.weight", "bituning.suffix_tokens"} <= touched
    assert WRITERS[prefix] in touched
    assert not any(name.startswith("mformer.lm_projection") for name, _ in model.named_parameters())


def test_a_deep_prefix_behind_an_instruction(build: Callable[..., Any]) -> None:
    settings = {"bituning": {"prefix_mode": "kv"}, "prompt": {"order": "prompt-first"}}
    model, inputs = build(**settings)
    found = losses(model, inputs, steps=2)
    assert all(np.isfinite(found))
    users = embeddings(model)[0]
    # the instruction is seen: other words, other embeddings
    other, _ = build(**{**settings, "prompt": {**settings["prompt"], "user_template": "glove {history}"}})
    other.load_state_dict(model.state_dict())
    assert float((embeddings(other)[0] - users).abs().max()) > 1e-3 * float(users.abs().max())


@pytest.mark.parametrize(
    "sections",
    [
        {"bituning": {"prefix_mode": "kv"}},
        {"bituning": {"prefix_mode": "kv"}, "prompt": {"order": "prompt-first"}},
        {"prompt": {"order": "prompt-first"}},
        {"prompt": {"order": "prompt-first", "reuse_instruction": False}},
        {},
    ],
    ids=["deep", "deep behind instruction", "reuse", "no reuse", "prefix first"],
)
def test_kept_prefixes_change_nothing_but_the_work(build: Callable[..., Any], sections: dict[str, Any]) -> None:
    model, inputs = build(**sections)
    histories = PackedSequences.from_lists(HISTORIES)
    expected = model.encode_users(histories)
    model.keep_prefixes(8)
    assert model.kept_prefixes is not None
    store, runs = model.kept_prefixes, []
    assert model.mformer is not None
    model.mformer.register_forward_hook(lambda module, given, result: runs.append(result.queries.shape[0]))
    for _ in range(2):
        torch.testing.assert_close(model.encode_users(histories), expected, rtol=1e-4, atol=1e-5)
    assert (store.hits, store.misses, runs) == (4, 4, [4])
    shuffled = model.encode_users(histories.select([3, 0, 3]))
    torch.testing.assert_close(shuffled, expected[[3, 0, 3]], rtol=1e-4, atol=1e-5)
    assert runs == [4]
    # a step of training: nothing stale is served
    losses(model, inputs, steps=1)
    changed = model.encode_users(histories)
    assert runs[-1] == 4
    model.keep_prefixes(0)
    assert model.kept_prefixes is None
    torch.testing.assert_close(changed, model.encode_users(histories), rtol=1e-4, atol=1e-5)
    assert float((changed - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("how", ["kept", "recorded", "instruction"])
def test_what_was_kept_in_another_precision_is_not_used(build: Callable[..., Any], how: str) -> None:
    model, _ = build(prompt={"order": "prompt-first"})
    histories = PackedSequences.from_lists(HISTORIES)
    if how == "kept":
        model.keep_prefixes(8)
    if how == "recorded":
        assert model.lm.layers
        model.lm.fixed_shapes = FixedShapes(model.lm, Recorder(), capacity=9)

    def ask() -> tuple[Tensor, Tensor]:
        plain = model.encode_users(histories)
        with torch.autocast("cpu", torch.bfloat16):
            return plain, model.encode_users(histories)

    expected = ask()
    assert not torch.equal(*expected)
    for _ in range(2):
        assert all(map(torch.equal, ask(), expected))
    model._apply(torch.clone)  # nothing is kept of before a move; now the other one is first
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_users(histories), expected[1])
    assert all(map(torch.equal, ask(), expected))


def test_what_cannot_be_kept_is_refused(build: Callable[..., Any]) -> None:
    encoder, _ = build(causal=False)
    with pytest.raises(ValueError, match='prefix_mode must be "kv" for a bidirectional language model'):
        encoder.keep_prefixes(4)
    bare, _ = build(bituning={"prefix": "none"})
    with pytest.raises(ValueError, match="the model must have a prefix, got none"):
        bare.keep_prefixes(4)
    with pytest.raises(ValueError, match="capacity must not be negative, got -1"):
        bare.keep_prefixes(-1)


def test_settings_that_contradict_each_other(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match='prefix_mode must be "embedding" when bituning.prefix is "none"'):
        build(bituning={"prefix": "none", "prefix_mode": "kv"})
    with pytest.raises(ValueError, match="reuse_instruction must be true with prompt.order"):
        build(
            bituning={"prefix_mode": "kv"},
            prompt={"order": "prompt-first", "reuse_instruction": False},
        )


@pytest.mark.parametrize("sections", [{}, {"prompt": {"order": "prompt-first", "reuse_instruction": False}}])
@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_training_packed_equals_training_padded(
    build: Callable[..., Any], causal: bool, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(causal=causal, **sections)
    packed = losses(model, inputs)
    twin, _ = build(causal=causal, **sections)
    twin.lm.model.set_attn_implementation("eager")

    def padded(lm: FrozenLM, embeds: Tensor, layout: PackedLayout) -> Tensor:
        lengths = layout.cu_seqlens.diff().tolist()
        rows = torch.nn.utils.rnn.pad_sequence(list(embeds.split(lengths)), batch_first=True)
        mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
        hidden: Tensor = lm.model(inputs_embeds=rows, attention_mask=mask.long()).last_hidden_state
        return layout.wanted(hidden[mask])

    monkeypatch.setattr(FrozenLM, "_run", padded)
    assert packed == pytest.approx(losses(twin, inputs), rel=1e-5)
    assert packed[-1] != packed[0]
