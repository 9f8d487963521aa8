"""Layout of prefix, text and suffix, written out by hand, and both read-outs."""

import pytest
import torch

from laser_fast.nn.bituning import BiTuning

CU_SEQLENS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)  # lengths 2, 0, 3
TEXT = torch.arange(5.0)[:, None].expand(-1, 4) + 1  # rows 1..5


def make(readout: str = "suffix", suffix: int = 1) -> BiTuning:
    tuning = BiTuning(4, num_suffix_tokens=suffix, readout=readout)
    with torch.no_grad():
        tuning.suffix_tokens.copy_(-torch.arange(1.0, suffix + 1)[:, None].expand(-1, 4))
    return tuning


def test_prefix_text_suffix_in_order() -> None:
    prefix = 100.0 * torch.arange(1.0, 4)[:, None, None] + torch.arange(2.0)[:, None].expand(3, 2, 4)
    packed = make(suffix=2).assemble(prefix, TEXT, CU_SEQLENS)
    expected = [100, 101, 1, 2, -1, -2, 200, 201, -1, -2, 300, 301, 3, 4, 5, -1, -2]
    assert packed.inputs_embeds[:, 0].tolist() == expected
    assert packed.cu_seqlens.tolist() == [0, 6, 10, 17]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.inputs_embeds[packed.text_and_suffix, 0].tolist() == [1, 2, -1, -2, -1, -2, 3, 4, 5, -1, -2]
    assert packed.text_and_suffix_cu_seqlens.tolist() == [0, 4, 6, 11]


def test_without_a_prefix() -> None:
    packed = make().assemble(None, TEXT, CU_SEQLENS)
    assert packed.inputs_embeds[:, 0].tolist() == [1, 2, -1, -1, 3, 4, 5, -1]


def test_read_outs() -> None:
    hidden = torch.arange(17.0)[:, None].expand(-1, 4)
    prefix = torch.zeros(3, 2, 4)
    suffix = make("suffix", 2)
    assert suffix.read_out(hidden, suffix.assemble(prefix, TEXT, CU_SEQLENS))[:, 0].tolist() == [5, 9, 16]
    mean = make("mean", 2)
    # means over positions 2..5, 8..9 and 12..16: text and suffix, not the prefix
    assert mean.read_out(hidden, mean.assemble(prefix, TEXT, CU_SEQLENS))[:, 0].tolist() == [3.5, 8.5, 14.0]


def test_gradients_reach_prefix_text_and_suffix() -> None:
    tuning = BiTuning(4, num_shared_prefix_tokens=3)
    text = TEXT.clone().requires_grad_()
    packed = tuning.assemble(tuning.shared_prefix(3), text, CU_SEQLENS)
    weights = torch.arange(1.0, packed.inputs_embeds.shape[0] + 1)
    (packed.inputs_embeds.sum(1) * weights).sum().backward()
    assert text.grad is not None and tuning.prefix_tokens is not None
    assert tuning.prefix_tokens.grad is not None and tuning.suffix_tokens.grad is not None
    # positions (from 1): prefixes at 1..3, 7..9, 11..13; text at 4, 5, 14..16; suffixes at 6, 10, 17
    assert text.grad[:, 0].tolist() == [4, 5, 14, 15, 16]
    assert tuning.prefix_tokens.grad[:, 0].tolist() == [1 + 7 + 11, 2 + 8 + 12, 3 + 9 + 13]
    assert tuning.suffix_tokens.grad[:, 0].tolist() == [6 + 10 + 17]


def test_empty_batch() -> None:
    tuning = make("mean")
    packed = tuning.assemble(torch.zeros(0, 2, 4), TEXT[:0], torch.zeros(1, dtype=torch.int32))
    assert packed.inputs_embeds.shape == (0, 4)
    assert tuning.read_out(packed.inputs_embeds, packed).shape == (0, 4)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_suffix_tokens must be at least 1, got 0"):
        BiTuning(4, num_suffix_tokens=0)
    with pytest.raises(ValueError, match='readout must be "suffix" or "mean", got \'max\''):
        BiTuning(4, readout="max")


@pytest.mark.parametrize("offsets", [[0, 2, 6], [0, 2], [1, 2, 5], [0, 4, 2, 5]], ids=str)
def test_offsets_that_do_not_fit_the_text_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"BiTuning.assemble: cu_seqlens must (start|end|not decrease)"):
        make().assemble(None, TEXT, torch.tensor(offsets, dtype=torch.int32))
