"""The token budget: splitting, encoding part by part, halving when memory runs out, and what it says."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import PackedSequences, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.data.micro_batches import row_tokens
from laser_fast.data.sequences import cu_seqlens_of
from laser_fast.models.token_budget import Shortage, TokenBudget, is_out_of_memory

HISTORIES = PackedSequences.from_lists([[0, 1, 2, 3], [7], [], [3, 4], [5], [6, 8, 9]])


def text_batch(lengths: list[int]) -> PackedBatch:
    """Histories without items and texts of these lengths; row r's tokens are all r."""
    bounds = torch.from_numpy(cu_seqlens_of(np.array(lengths)))
    nothing = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return PackedBatch(torch.zeros(0, dtype=torch.int64), nothing, tokens, bounds)


def first_tokens(limit: int, error: RuntimeError | None = None) -> Any:
    """An encoder whose memory ends at `limit` tokens; a row's embedding is its first token, and calls are kept."""
    calls: list[int] = []

    def encode(batch: PackedBatch) -> Tensor:
        calls.append(len(batch.input_ids))
        if len(batch.input_ids) > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand much more")
        return batch.input_ids[batch.token_cu_seqlens[:-1].long()][:, None].float()

    return encode, calls


def no_virtual(batch: PackedBatch) -> int:
    return 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_message_of_this_torch_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_without_a_limit_a_batch_stays_whole() -> None:
    batch = text_batch([3, 3])
    assert [rows.tolist() for rows in TokenBudget().split(batch, no_virtual)] == [[0, 1]]
    assert [rows.tolist() for rows in TokenBudget(6).split(batch, no_virtual)] == [[0, 1]]
    assert [rows.tolist() for rows in TokenBudget(6).split(batch, lambda batch: 1)] == [[0], [1]]
    with pytest.raises(ValueError, match="TokenBudget: limit must be at least 1, got 0"):
        TokenBudget(0)


def test_a_row_above_the_limit_is_named_once() -> None:
    budget = TokenBudget(4)
    with pytest.warns(UserWarning, match=r"micro_batch_tokens = 4 packed tokens, got 9 in row 1 of 3; .* alone"):
        parts = budget.split(text_batch([2, 9, 2]), no_virtual)
    assert [rows.tolist() for rows in parts] == [[0, 2], [1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.split(text_batch([2, 9, 2]), no_virtual)


def test_parts_are_encoded_in_the_order_of_the_rows() -> None:
    encode, calls = first_tokens(8)
    encoded = TokenBudget(8).encode(text_batch([7, 5, 1, 3, 2]), no_virtual, encode)  # rows 0, 2 | 1, 3 | 4
    assert encoded[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert calls == [8, 8, 2]
    encode, calls = first_tokens(99)
    assert TokenBudget(18).encode(text_batch([7, 5, 1, 3, 2]), no_virtual, encode)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert calls == [18]


def test_a_limit_is_halved_until_what_is_encoded_fits() -> None:
    told: list[Shortage] = []
    budget = TokenBudget(halve=True, on_halving=told.append)
    encode, calls = first_tokens(6)
    message = r"training: memory must suffice to encode 20 packed tokens \(5 rows\), got CUDA out of memory. Tried to "
    with pytest.warns(UserWarning, match=message + r"allocate 2.00 GiB; micro_batch_tokens is 10 from here on"):
        encoded = budget.encode(text_batch([4, 4, 4, 4, 4]), no_virtual, encode)
    assert encoded[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert [shortage.tokens for shortage in told] == [20, 8] and budget.limit == 4
    assert calls == [20, 8, 4, 4, 4, 4, 4]


def test_halving_leaves_room_for_the_longest_row() -> None:
    budget = TokenBudget(halve=True)
    encode, _ = first_tokens(9)
    with pytest.warns(UserWarning, match="micro_batch_tokens is 9 from"):
        assert budget.encode(text_batch([1, 9, 1]), no_virtual, encode)[:, 0].tolist() == [0, 1, 2]
    assert budget.limit == 9


def test_a_single_row_that_does_not_fit_stops() -> None:
    encode, _ = first_tokens(6)
    with (
        pytest.warns(UserWarning, match="micro_batch_tokens is 7 from"),
        pytest.raises(
            torch.OutOfMemoryError, match=r"^LaserModel: memory must suffice to encode 7 packed tokens \(1 row"
        ),
    ):
        TokenBudget(halve=True).encode(text_batch([7, 2]), no_virtual, encode)


def test_without_halving_the_message_says_what_was_needed() -> None:
    encode, calls = first_tokens(6, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"))
    message = r"^LaserModel: memory .* 9 packed tokens \(2 rows\), got DefaultCPU.* 1 byte; lower batch_size$"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        TokenBudget().encode(text_batch([7, 2]), no_virtual, encode)
    assert calls == [9]


def test_other_errors_pass_through() -> None:
    encode, calls = first_tokens(6, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        TokenBudget(halve=True).encode(text_batch([7, 2]), no_virtual, encode)
    assert calls == [9]


@pytest.mark.parametrize("order", ["prefix-first", "prompt-first"])
@pytest.mark.parametrize("prefix", ["mformer", "linear", "shared", "none"])
def test_the_count_is_what_the_language_model_sees(
    make_laser: Callable[..., Any], tokens_seen: Callable[[Any], list[int]], prefix: str, order: str
) -> None:
    prompt = {"order": order, "reuse_instruction": False, "user_template": "red blue : {history} , saw"}
    model, inputs = make_laser(bituning={"prefix": prefix}, prompt=prompt)
    rows = training_rows(inputs.split.train, 4).select(np.arange(6))
    batch = model.builder.training_batch(rows, with_positives=True)
    model.refresh_items()
    seen = tokens_seen(model)
    model(batch)
    assert sum(seen) == row_tokens(batch, model.virtual_tokens).total and len(seen) == 2


def test_encoding_keeps_within_the_limit_and_gives_the_same(
    make_laser: Callable[..., Any], tokens_seen: Callable[[Any], list[int]]
) -> None:
    model, _ = make_laser()
    users, items = model.encode_users(HISTORIES), model.refresh_items()
    seen = tokens_seen(model)
    model.budget = TokenBudget(24)
    torch.testing.assert_close(model.encode_users(HISTORIES), users, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.refresh_items(), items, rtol=1e-4, atol=1e-5)
    assert max(seen) <= 24 and len(seen) > 4
