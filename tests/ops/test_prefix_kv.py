"""Prefix injection: the compiled copies against the reference, and both against a loop that anyone can read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laser_fast.ops import native
from laser_fast.ops.prefix_kv import inject_prefix_kv, inject_prefix_kv_reference

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

LENGTHS = {
    "several": [3, 1, 5],
    "empty-first-middle-last": [0, 4, 0, 0, 2, 0],
    "all-empty": [0, 0, 0],
    "one": [7],
    "one-empty": [0],
    "none": [],
    "many": [(7 * b) % 13 for b in range(300)],
}
lengths_cases = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
prefix_cases = pytest.mark.parametrize("prefix_length", [0, 1, 4], ids="P={}".format)
shared_cases = pytest.mark.parametrize("shared", [False, True], ids=["per-sequence", "shared"])
dtype_cases = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@pytest.fixture(params=["compiled", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The op on the CPU as it runs with the compiled library, and as it runs without."""
    if request.param == "reference":
        absent = native.NativeLibrary("none", "hidden by the test", None)
        monkeypatch.setattr(native, "load_native", lambda: absent)
    elif native.load_native().module is None:
        pytest.skip(f"no compiled library: {native.load_native().reason}")
    return str(request.param)


def make_inputs(
    lengths: list[int], prefix_length: int, shared: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(len(lengths) + 31 * prefix_length)
    heads, width = 2, 8
    text = (sum(lengths), heads, width)
    prefix = (1 if shared else len(lengths), prefix_length, heads, width)
    key, value, prefix_key, prefix_value = (
        torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for shape in (text, text, prefix, prefix)
    )
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    return key, value, prefix_key, prefix_value, cu_seqlens.to(device)


def inject_by_hand(text: Tensor, prefix: Tensor, cu_seqlens: Tensor) -> Tensor:
    pieces = [text.new_empty(0, *text.shape[1:])]
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        pieces += [prefix[0 if prefix.shape[0] == 1 else b], text[begin:end]]
    return torch.cat(pieces)


@lengths_cases
@prefix_cases
@shared_cases
def test_values_equal_a_loop(backend: str, lengths: list[int], prefix_length: int, shared: bool) -> None:
    inputs = make_inputs(lengths, prefix_length, shared)
    key, value, cu_seqlens = inject_prefix_kv(*inputs)
    assert torch.equal(key, inject_by_hand(inputs[0], inputs[2], inputs[4]))
    assert torch.equal(value, inject_by_hand(inputs[1], inputs[3], inputs[4]))
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [begin + b * prefix_length for b, begin in enumerate(inputs[4].tolist())]


@dtype_cases
@shared_cases
def test_every_dtype_is_copied_exactly(backend: str, dtype: torch.dtype, shared: bool) -> None:
    inputs = make_inputs([3, 0, 5], 2, shared, dtype)
    for actual, expected in zip(inject_prefix_kv(*inputs), inject_prefix_kv_reference(*inputs), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_strided_inputs_and_odd_widths(backend: str) -> None:
    key, value, prefix_key, prefix_value, cu_seqlens = make_inputs([2, 3], 2, False, torch.float16)
    views = [tensor.transpose(-1, -2)[..., :1, :] for tensor in (key, value, prefix_key, prefix_value)]
    actual = inject_prefix_kv(*views, cu_seqlens)
    assert torch.equal(actual[0], inject_by_hand(views[0], views[2], cu_seqlens))
    assert torch.equal(actual[1], inject_by_hand(views[1], views[3], cu_seqlens))
    assert all(tensor.is_contiguous() for tensor in actual)


def test_nan_and_infinity_travel_unchanged(backend: str) -> None:
    key, value, prefix_key, prefix_value, cu_seqlens = make_inputs([2], 1, True)
    key[0], value[1], prefix_key[0] = float("nan"), float("inf"), float("-inf")
    actual_key, actual_value, _ = inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens)
    assert actual_key[1].isnan().all()
    assert actual_value[2].isposinf().all()
    assert actual_key[0].isneginf().all()


def test_the_row_mapping_of_the_gpu_equals_the_copies_of_the_cpu() -> None:
    mapping = native.load_native().function("prefix_sources_cpu")
    if mapping is None:
        pytest.skip(f"no compiled library: {native.load_native().reason}")
    for lengths in LENGTHS.values():
        for prefix_length in (0, 1, 4):
            for shared in (False, True):
                num_text, num_prefixes = sum(lengths), 1 if shared else len(lengths)
                text = torch.arange(num_text, dtype=torch.float64).view(-1, 1, 1)
                prefix = -1.0 - torch.arange(num_prefixes * prefix_length, dtype=torch.float64)
                prefix = prefix.view(num_prefixes, prefix_length, 1, 1)
                cu_seqlens = make_inputs(lengths, 0, True)[4]
                copied = inject_prefix_kv(text, text, prefix, prefix, cu_seqlens)[0].flatten()
                sources = torch.empty(len(copied), 2, dtype=torch.int64)
                mapping(cu_seqlens, num_text, prefix_length, shared, sources)
                named = torch.where(sources[:, 0] == 1, -1 - sources[:, 1], sources[:, 1])
                assert torch.equal(named.double(), copied)


@pytest.mark.parametrize("offsets", [[-5, 9], [9, 0], [0, 100], [2**31 - 1, -(2**31)]], ids=str)
def test_malformed_offsets_map_to_no_row_outside(offsets: list[int]) -> None:
    mapping = native.load_native().function("prefix_sources_cpu")
    if mapping is None:
        pytest.skip(f"no compiled library: {native.load_native().reason}")
    sources = torch.empty(4 + 3, 2, dtype=torch.int64)
    mapping(torch.tensor(offsets, dtype=torch.int32), 4, 3, False, sources)
    from_prefix, row = sources.unbind(1)
    assert (row[from_prefix == 1] < 3).all()
    assert (row[from_prefix == 0] < 4).all()
    assert (row >= -1).all()


@shared_cases
@pytest.mark.parametrize("lengths", [[3, 0, 2], []], ids=["several", "none"])
def test_gradients(backend: str, lengths: list[int], shared: bool) -> None:
    *tensors, cu_seqlens = make_inputs(lengths, 2, shared, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    actual = torch.autograd.grad(sum(x.square().sum() for x in inject_prefix_kv(*leaves, cu_seqlens)[:2]), leaves)
    reference = inject_prefix_kv_reference(*leaves, cu_seqlens)
    expected = torch.autograd.grad(sum(x.square().sum() for x in reference[:2]), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)  # a shared prefix adds in another order than the reference
    if lengths:
        narrow = [
            tensor[..., :1, :2].detach().requires_grad_() for tensor in tensors
        ]  # one check per number: few will do
        assert torch.autograd.gradcheck(lambda *t: inject_prefix_kv(*t, cu_seqlens)[:2], narrow)
        assert torch.autograd.gradgradcheck(lambda *t: inject_prefix_kv(*t, cu_seqlens)[:2], narrow)


def test_the_gradient_of_a_shared_prefix_is_summed_in_float32() -> None:
    # in bfloat16, 256 + 1 stays 256: a sum in that precision would lose all ones
    *tensors, cu_seqlens = make_inputs([1] * 512, 1, True, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    inject_prefix_kv(*leaves, cu_seqlens)[0].sum().backward()
    assert (leaves[2].grad == 512).all()


def test_gradients_that_nobody_needs_stay_none() -> None:
    key, value, prefix_key, prefix_value, cu_seqlens = make_inputs([3, 2], 2, False)
    prefix_key.requires_grad_()
    injected = inject_prefix_kv(key, value, prefix_key, prefix_value, cu_seqlens)
    injected[0].sum().backward()
    assert prefix_key.grad is not None
    assert key.grad is value.grad is prefix_value.grad is None
    assert not injected[2].requires_grad


def test_two_runs_and_two_backwards_are_bit_equal_and_inputs_stay(backend: str) -> None:
    *tensors, cu_seqlens = make_inputs([3, 0, 40], 4, True, torch.float16)
    kept = [tensor.clone() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    first, second = inject_prefix_kv(*leaves, cu_seqlens), inject_prefix_kv(*leaves, cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = first[0].float().square().sum() + first[1].float().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, leaves, strict=True))


@shared_cases
@pytest.mark.parametrize("lengths", [[3, 0, 5], [0], []], ids=["several", "one-empty", "none"])
def test_opcheck(backend: str, lengths: list[int], shared: bool) -> None:
    *tensors, cu_seqlens = make_inputs(lengths, 2, shared)
    for needs_grad in (False, True):
        arguments = (*[tensor.detach().clone().requires_grad_(needs_grad) for tensor in tensors], cu_seqlens)
        torch.library.opcheck(torch.ops.laser_fast.inject_prefix_kv, arguments)


def test_compiles_without_a_graph_break() -> None:
    *tensors, cu_seqlens = make_inputs([3, 0, 5], 2, True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    compiled = torch.compile(inject_prefix_kv, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*leaves, cu_seqlens), inject_prefix_kv(*leaves, cu_seqlens)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ours = torch.autograd.grad(actual[0].square().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected[0].square().sum(), leaves, allow_unused=True)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 3, 5], r"cu_seqlens must start at 0, got 1"),
        ([0, 4, 3, 5], r"cu_seqlens must not decrease, got 4"),
        ([0, 6], r"cu_seqlens must end at .* 5, got 6"),
        ([0, 4], r"cu_seqlens must end at .* 5, got 4"),
        ([0], r"cu_seqlens must end at .* 5, got 0"),
    ],
    ids=["start", "decrease", "too-far", "too-short", "no-sequence"],
)
def test_bad_offsets_are_refused(backend: str, offsets: list[int], message: str) -> None:
    key, value, prefix_key, prefix_value, _ = make_inputs([5], 2, True)
    with pytest.raises(ValueError, match="inject_prefix_kv: " + message):
        inject_prefix_kv(key, value, prefix_key, prefix_value, torch.tensor(offsets, dtype=torch.int32))


def test_bad_offsets_are_refused_before_anything_is_written() -> None:
    function = native.load_native().function("inject_prefix_kv_cpu")
    if function is None:
        pytest.skip(f"no compiled library: {native.load_native().reason}")
    key, value, prefix_key, prefix_value, _ = make_inputs([5, 0], 2, True)
    outputs = torch.full((9, 2, 8), 7.0), torch.full((9, 2, 8), 7.0), torch.full((3,), 7, dtype=torch.int32)
    bad = torch.tensor([0, 5, 4], dtype=torch.int32)  # only the last entry is wrong
    with pytest.raises(ValueError, match="must not decrease, got 5 before 4"):
        function(key, value, prefix_key, prefix_value, bad, *outputs)
    assert all((tensor == 7).all() for tensor in outputs)


def test_the_library_checks_its_own_arguments() -> None:
    function = native.load_native().function("inject_prefix_kv_cpu")
    if function is None:
        pytest.skip(f"no compiled library: {native.load_native().reason}")
    key, value, prefix_key, prefix_value, cu_seqlens = make_inputs([3, 2], 2, False)
    outputs = torch.empty(9, 2, 8), torch.empty(9, 2, 8), torch.empty(3, dtype=torch.int32)
    good = [key, value, prefix_key, prefix_value, cu_seqlens, *outputs]
    function(*good)
    for position, bad, error, message in (
        (0, key.int(), TypeError, "key must be float16, bfloat16, float32 or float64"),
        (1, value.double(), TypeError, "value must have DLPack type"),
        (1, value[:4], ValueError, "value must have size 5 in dimension 0, got 4"),
        (2, prefix_key[0], ValueError, "prefix_key must have 4 dimensions, got 3"),
        (2, torch.empty(3, 2, 2, 8), ValueError, "prefix_key must have size 2 in dimension 0, got 3"),
        (3, torch.empty(2, 1, 2, 8), ValueError, "prefix_value must have size 2 in dimension 1, got 1"),
        (4, cu_seqlens.long(), TypeError, "cu_seqlens must have DLPack type"),
        (4, cu_seqlens[:0], ValueError, "cu_seqlens must have at least 1 entry"),
        (5, torch.empty(8, 2, 8), ValueError, "output_key must have size 9 in dimension 0, got 8"),
        (6, torch.empty(9, 8, 2).transpose(1, 2), ValueError, "output_value must be contiguous"),
        (7, outputs[2][:2], ValueError, "output_cu_seqlens must have size 3 in dimension 0, got 2"),
    ):
        arguments = [bad if index == position else tensor for index, tensor in enumerate(good)]
        with pytest.raises(error, match=f"inject_prefix_kv: {message}"):
            function(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(5, 2, 8, dtype=torch.int32)}, TypeError, "key must be float16, .*, got torch.int32"),
        ({"value": torch.zeros(5, 2, 8, dtype=torch.float16)}, TypeError, "value must be torch.float32, got"),
        ({"prefix_value": torch.zeros(1, 2, 2, 8).double()}, TypeError, "prefix_value must be torch.float32, got"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, ValueError, "cu_seqlens must have shape"),
        ({"key": torch.zeros(5, 16)}, ValueError, r"key must have 3 dimensions, got shape \(5, 16\)"),
        ({"prefix_key": torch.zeros(2, 2, 8)}, ValueError, r"prefix_key must have 4 dimensions"),
        ({"value": torch.zeros(4, 2, 8)}, ValueError, r"key and value must have one shape, got \(5, 2, 8\) and \(4,"),
        ({"prefix_value": torch.zeros(1, 3, 2, 8)}, ValueError, "prefix_key and prefix_value must have one shape"),
        (
            {"prefix_key": torch.zeros(1, 2, 4, 8), "prefix_value": torch.zeros(1, 2, 4, 8)},
            ValueError,
            r"must agree in heads and head width, got \(1, 2, 4, 8\) and \(5, 2, 8\)",
        ),
        (
            {"prefix_key": torch.zeros(3, 2, 2, 8), "prefix_value": torch.zeros(3, 2, 2, 8)},
            ValueError,
            "prefix_key must have 1 or B = 2 prefixes, got 3",
        ),
        ({"value": torch.zeros(5, 2, 8, device="meta")}, ValueError, "one device, got .*value on meta"),
    ],
)
def test_arguments_are_checked(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    names = ("key", "value", "prefix_key", "prefix_value", "cu_seqlens")
    arguments = dict(zip(names, make_inputs([3, 2], 2, True), strict=True)) | change
    with pytest.raises(error, match=f"inject_prefix_kv: .*{message}"):
        inject_prefix_kv(**arguments)


def test_too_many_rows_for_int32_are_refused() -> None:
    key = torch.empty(2**30, 1, 1, device="meta")
    prefix = torch.empty(1, 2**30, 1, 1, device="meta")
    cu_seqlens = torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"T \+ B P must fit in int32, got 2147483648"):
        inject_prefix_kv(key, key, prefix, prefix, cu_seqlens)


@pytest.mark.gpu
@dtype_cases
@shared_cases
@lengths_cases
def test_cuda_equals_the_cpu(lengths: list[int], shared: bool, dtype: torch.dtype) -> None:
    assert native.cuda_absence(0) == ""
    inputs = make_inputs(lengths, 3, shared, dtype, "cuda")
    expected = inject_prefix_kv_reference(*(tensor.cpu() for tensor in inputs))
    for actual, exact in zip(inject_prefix_kv(*inputs), expected, strict=True):
        assert torch.equal(actual.cpu(), exact)


@pytest.mark.gpu
def test_cuda_writes_nothing_outside_and_serves_every_alignment() -> None:
    function = native.load_native().function("inject_prefix_kv_cuda")
    assert function is not None
    for width in (1, 2, 3, 8):
        key, value, prefix_key, prefix_value, cu_seqlens = make_inputs([3, 0, 9], 2, False, torch.float16, "cuda")
        tensors = [tensor[..., :width].contiguous() for tensor in (key, value, prefix_key, prefix_value)]
        guarded = [torch.full((18 + 8, 2, width), 7.0, dtype=torch.float16, device="cuda") for _ in range(2)]
        offsets = torch.full((4,), 7, dtype=torch.int32, device="cuda")
        function(*tensors, cu_seqlens, *(tensor[4:-4] for tensor in guarded), offsets)
        expected = inject_prefix_kv_reference(*tensors, cu_seqlens)
        for tensor, exact in zip(guarded, expected[:2], strict=True):
            assert torch.equal(tensor[4:-4], exact)
            assert (tensor[:4] == 7).all()
            assert (tensor[-4:] == 7).all()
