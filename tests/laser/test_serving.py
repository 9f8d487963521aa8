"""The choice of how the language model runs for requests: same recommendations, nothing compiled after `warmup`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from laser_fast.data import PackedSequences, training_rows
from laser_fast.laser import LaserModel
from laser_fast.lm.execution.cuda_graphs import Recorder
from laser_fast.lm.execution.execution import frozen_layers
from laser_fast.lm.execution.fixed_shapes import FixedShapes

FORMS: dict[str, dict[str, Any]] = {
    "encoder": {"lm": "bert"},
    "encoder, mean": {"lm": "bert", "bituning": {"readout": "mean"}},
    "encoder, deep prefix": {"lm": "bert", "bituning": {"prefix_mode": "kv"}},
    "decoder": {"lm": "llama"},
    "decoder, deep prefix": {"lm": "llama", "bituning": {"prefix_mode": "kv"}},
}


@pytest.fixture(autouse=True)
def _no_compilations_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def requests(count: int, users: int = 6) -> Iterator[PackedSequences]:
    draw = np.random.default_rng(0)
    for _ in range(count):
        lengths = draw.integers(0, 7, size=draw.integers(1, users + 1))
        yield PackedSequences.from_lists([draw.integers(0, 25, size=length).tolist() for length in lengths])


def assert_same_embeddings(model: LaserModel, histories: PackedSequences, expected: Tensor) -> None:
    torch.testing.assert_close(
        model.encode_users(histories), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("form", FORMS)
def test_after_warmup_nothing_is_compiled(ready_laser: Callable[..., Any], form: str) -> None:
    model = ready_laser(**FORMS[form])
    plain = [(histories, model.encode_users(histories)) for histories in requests(8)]
    forwards = [vars(layer).get("forward") for layer in frozen_layers(model.lm.model)]
    counter = CompileCounterWithBackend("eager")
    model.serving.use("compile", backend=counter)
    assert model.serving.mode == "compile" and counter.frame_count == 0
    model.serving.warmup()
    warm = counter.frame_count
    assert 1 <= warm <= 2
    for histories, expected in plain:
        assert_same_embeddings(model, histories, expected)
    model.recommend([["i3", "i4"], []], k=3)
    assert counter.frame_count == warm
    model.serving.use("none")
    assert [vars(layer).get("forward") for layer in frozen_layers(model.lm.model)] == forwards
    assert all(torch.equal(model.encode_users(histories), expected) for histories, expected in plain)


@pytest.mark.parametrize("form", FORMS)
def test_filled_batches_recommend_the_same(ready_laser: Callable[..., Any], form: str) -> None:
    model = ready_laser(**FORMS[form])
    plain = [(histories, model.encode_users(histories)) for histories in requests(8)]
    model.lm.fixed_shapes = shapes = FixedShapes(model.lm, Recorder())
    for histories, expected in plain:
        assert_same_embeddings(model, histories, expected)
    assert 1 <= shapes.num_captures <= 12
    model.serving.use("none")
    assert model.lm.fixed_shapes is None


@pytest.mark.parametrize("mode", ["compile", "graphs"])
def test_kept_prefixes_are_served(ready_laser: Callable[..., Any], mode: str) -> None:
    model = ready_laser("llama")
    plain = [(histories, model.encode_users(histories)) for histories in requests(12)]
    model.keep_prefixes(100)
    if mode == "compile":
        model.serving.use("compile", backend="eager")
    else:
        model.lm.fixed_shapes = FixedShapes(model.lm, Recorder())
    for histories, expected in (*plain, *plain):
        assert_same_embeddings(model, histories, expected)
    assert model.kept_prefixes is not None and model.kept_prefixes.hits > 12
    model.bituning.suffix_tokens.data.mul_(-1.0)
    changed = model.encode_users(plain[-1][0])
    assert not torch.allclose(changed, plain[-1][1], atol=1e-2)


def test_warmup_captures_what_requests_of_one_user_need(ready_laser: Callable[..., Any]) -> None:
    model = ready_laser("llama")
    model.lm.fixed_shapes = shapes = FixedShapes(model.lm, Recorder(), max_tokens=128)
    model.serving.warmup()
    before = shapes.num_captures
    assert 5 <= before <= 8
    for histories in requests(30, users=1):
        model.encode_users(histories)
    assert shapes.num_captures == before
    model.serving.warmup([(4, 10), (1, 30), (2, 9)])
    before = shapes.num_captures
    model.encode_users(PackedSequences.from_lists([[1, 2], [3], [4, 5, 6, 7]]))
    assert shapes.num_captures == before
    with pytest.raises(ValueError, match=r"shapes must be pairs of at least 1, got \[\(0, 3\)\]"):
        model.serving.warmup([(0, 3)])


def test_training_is_as_ever(ready_laser: Callable[..., Any], make_laser: Callable[..., Any]) -> None:
    def losses(mode: str) -> list[float]:
        model = ready_laser("llama")
        counter = CompileCounterWithBackend("eager")
        model.serving.use(mode, backend=counter)
        batch = model.builder.training_batch(training_rows(inputs.split.train, 4).select([0, 5]), with_positives=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(3):
            loss = model(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert counter.frame_count == 0
        return found

    _, inputs = make_laser()
    assert losses("compile") == losses("none")


def test_what_cannot_be_is_refused(ready_laser: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready_laser("llama")
    with pytest.raises(ValueError, match=r"mode must be one of \('none', 'compile', 'graphs'\), got 'fast'"):
        model.serving.use("fast")
    with pytest.raises(RuntimeError, match='"graphs" needs a language model on a CUDA device, got cpu'):
        model.serving.use("graphs")
    monkeypatch.setattr("laser_fast.lm.execution.compiled_layers.frozen_layers", lambda model: [])
    with pytest.raises(ValueError, match='"compile" needs layers that can be compiled, got none in LlamaModel'):
        model.serving.use("compile")
    assert model.serving.mode == "none" and len(frozen_layers(model.lm.model)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "graphs"])
def test_requests_on_a_gpu(ready_laser: Callable[..., Any], mode: str) -> None:
    model = ready_laser("llama").to("cuda", torch.bfloat16)
    plain = [(histories, model.encode_users(histories).float()) for histories in requests(20)]
    model.serving.use(mode)
    model.serving.warmup()
    for histories, expected in plain:
        actual = model.encode_users(histories).float()
        torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))
