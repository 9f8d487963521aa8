"""How often the host waits for the device in a step: once, at its end, to see that nothing was infinite.

There is no GPU here, so one is pretended: tensors say that they are on it, compute on the CPU, and every operation
after which a real one would have been waited for is counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from laser_fast.config import LaserConfig, OptimizerConfig, build_config
from laser_fast.data import training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.laser.build import build_laser, load_inputs, load_language_model
from laser_fast.lm.attention import flash as attention_flash
from laser_fast.lm.attention.packed_attention import record_backends
from laser_fast.lm.execution.execution import Execution, apply_execution
from laser_fast.models.device_batches import on_device
from laser_fast.nn.stage1.text_branch import select_sequences
from laser_fast.ops import backends
from laser_fast.ops.checks import validate_indices
from laser_fast.ops.host_copies import on_host, to_device
from laser_fast.ops.segments import even_cu_seqlens, lengthened_cu_seqlens, segment_positions
from laser_fast.training.loop import StageTrainer

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
# what reads values, or makes a tensor whose size depends on them
READS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.equal}
FACTORIES = {
    getattr(torch, name) for name in ("arange", "empty", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
}


class OnGpu(Tensor):
    """A tensor of the CPU that says it is on the GPU, to Python; torch itself has no library of that device here."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        layout = inner.shape, inner.stride(), inner.storage_offset()
        return Tensor._make_wrapper_subclass(cls, *layout, dtype=inner.dtype, device=HOST)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor of the pretended GPU outlived it")


def _wrapped(output: Any) -> Any:
    return tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x, output)


def _unwrapped(arguments: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, OnGpu) else x, arguments)


class _Copies(TorchFunctionMode):
    """What is made on the GPU or moved there and back, by the device that Python code names."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.cpu, Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnGpu):
                self._note(func.__name__)
                return func(args[0].detach().inner)
            if func is Tensor.to:
                return self._to(*args, **kwargs)
            target = kwargs.get("device")
            if target is None or torch.device(target).type != "cuda":
                return func(*args, **kwargs)
            assert func in FACTORIES or isinstance(args[0], OnGpu), func
            if func is torch.tensor:
                self._note("tensor")
            return _wrapped(func(*args, **kwargs | {"device": HOST}))

    def _to(self, tensor: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype
        named = [
            argument for argument in (*args, kwargs.pop("device", None)) if isinstance(argument, torch.device | str)
        ]
        args = tuple(argument for argument in args if not isinstance(argument, torch.device | str))
        target = torch.device(named[0]) if named else tensor.device
        moved = tensor.to(*args, **kwargs) if args or kwargs else tensor
        if (target.type == "cuda") == isinstance(tensor, OnGpu):
            return moved
        if not non_blocking or target.type == "cpu":
            self._note("to")
        assert not moved.requires_grad
        return OnGpu(moved) if target.type == "cuda" else moved.inner


class PretendedGpu(TorchDispatchMode):
    """Runs what is asked of the GPU on the CPU, and notes where the host would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._copies = _Copies(self.note)

    def __enter__(self) -> PretendedGpu:
        super().__enter__()
        self._copies.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._copies.__exit__(*reason)
        super().__exit__(*reason)

    def note(self, what: str) -> None:
        own = [frame for frame in traceback.extract_stack() if "/laser_fast/" in frame.filename]
        where = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].name}" if own else "elsewhere"
        self.waits.append(f"{what} in {where}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, func.overloadpacket
        if not any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        reads = kind in READS
        if kind is ATEN.copy_:
            reads = isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu)
        elif kind in (ATEN.index, ATEN.index_put_):  # a mask has as many rows as it holds ones
            reads = any(x is not None and x.dtype == torch.bool for x in args[1])
        elif kind is ATEN.repeat_interleave:
            reads = kwargs.get("output_size") is None
        if reads:
            self.note(kind.__name__)
        output = func(*_unwrapped(args), **_unwrapped(kwargs))
        return output if kind is ATEN._local_scalar_dense else _wrapped(output)


def flash_reference(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """In the place of FlashAttention: any differentiable function of its inputs; values are not looked at here."""
    mixed = (key + value).mean() * query
    return mixed, mixed, mixed, mixed, mixed


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: self)
    monkeypatch.setattr(backends, "triton_absence", lambda _: "no such kernel on a pretended GPU")
    monkeypatch.setattr(backends, "warn_fallback", lambda *_: None)
    monkeypatch.setattr(backends, "compiled_operation", lambda *_: None)
    monkeypatch.setattr(attention_flash, "flash_attn_function", lambda: None)
    monkeypatch.setattr(attention_flash, "torch_flash_function", lambda: flash_reference)
    monkeypatch.setattr(attention_flash, "takes_grouped_queries", lambda _: True)
    # written in C++, which is not told that the tensors are on the GPU
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", _group)
    with PretendedGpu() as device:
        yield device


def _group(lists: list[list[Tensor]]) -> dict[Any, Any]:
    return {(lists[0][0].device, lists[0][0].dtype): (lists, [])}


def move(module: nn.Module) -> None:
    """`module.to(GPU)` with parameters of the pretended kind."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.data.to(GPU), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(GPU)


READERS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 1).any()),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 1],
    "nonzero": lambda x: (x > 1).nonzero(),
    "unique": lambda x: x.unique(),
    "blocking copy": lambda x: torch.tensor([1, 2]).to(x.device),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "read on the host": lambda x: on_host(x + 1),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x + 1).cumsum(0)[1:, None].expand(-1, 4).sum(),
    "repeat_interleave": lambda x: x.repeat_interleave(x, output_size=6),
    "copy": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    "offsets that only the device has": lambda x: segment_positions(x.int(), 3),
    "indices that only the device has": lambda x: validate_indices("test", "x", x, 4),
    "known on the host": lambda x: on_host(to_device(torch.tensor([1, 2]), x.device)).tolist(),
}


@pytest.mark.parametrize("name", READERS)
def test_the_pretended_gpu_sees_that_the_host_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as device:
        READERS[name](torch.arange(4, device=GPU))
    assert len(device.waits) == 1


@pytest.mark.parametrize("name", FREE)
def test_and_that_it_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as device:
        FREE[name](torch.arange(4, device=GPU))
    assert device.waits == []


def test_what_was_written_to_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as device:
        offsets = to_device(torch.tensor([0, 2, 5], dtype=torch.int32), GPU)
        assert on_host(offsets).tolist() == [0, 2, 5] and device.waits == []
        offsets.add_(1)
        assert on_host(offsets).tolist() == [1, 3, 6] and len(device.waits) == 1


DERIVED: dict[str, Callable[[], Tensor]] = {
    "even": lambda: even_cu_seqlens(3, 4, GPU),
    "lengthened": lambda: lengthened_cu_seqlens(to_device(torch.tensor([0, 2, 2, 5], dtype=torch.int32), GPU), 7),
    "twice": lambda: lengthened_cu_seqlens(lengthened_cu_seqlens(even_cu_seqlens(2, 3, GPU), 1), 2),
    "selected": lambda: select_sequences(
        to_device(torch.tensor([0, 2, 2, 5], dtype=torch.int32), GPU), to_device(torch.tensor([2, 0, 2]), GPU)
    )[1],
}


@pytest.mark.parametrize("name", DERIVED)
def test_offsets_made_of_others_are_the_same_on_both_sides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as device:
        offsets = DERIVED[name]()
        known = on_host(offsets).tolist()
        assert device.waits == [] and known == offsets.tolist() and known[0] == 0 < known[-1]


def test_a_batch_that_was_moved_is_known_on_the_host_however_often_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(*lengths: int) -> tuple[Tensor, Tensor]:
        return torch.arange(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    items = PackedBatch(*packed(1, 1), *packed(3, 2), (7,))
    more = {"targets": torch.tensor([4, 4]), "positive_targets": torch.tensor([0, 0]), "folds": torch.tensor([1, -1])}
    batch = PackedBatch(*packed(2, 0), *packed(4, 1), (7,), positives=items, **more)
    with pretended_gpu(monkeypatch) as device:
        moved = on_device(batch, GPU)
        for found in (moved, on_device(moved, GPU)):
            for one, host in ((found, batch), (found.positives, items)):
                assert one is not None and one.instruction == (7,)
                tensors = {name: value for name, value in vars(host).items() if isinstance(value, Tensor)}
                assert all(vars(one)[name].is_cuda for name in tensors)
                assert all(on_host(vars(one)[name]) is value for name, value in tensors.items())
        assert device.waits == []


VARIANTS: dict[str, dict[str, Any]] = {
    "mformer": {},
    "mformer in float32": {"mformer": {"dtype": "float32"}},
    "folds": {"recommender": "folds"},
    "shared prefix, mean read-out": {"bituning": {"prefix": "shared", "readout": "mean"}},
    "keys and values": {"bituning": {"prefix_mode": "kv"}, "lm": "decoder"},
    "prompt first": {"prompt": {"order": "prompt-first"}, "lm": "decoder"},
    "recomputed layers": {"execution": {"checkpointing": "full", "checkpoint_mformer": True}},
    "embeddings on the host": {"lm": {"embedding_device": "cpu"}},
    "sampled candidates": {"objective": {"candidates": "sampled", "num_negatives": 2, "item_gradient": "none"}},
    "text residual": {"text": {"residual": True}, "objective": {"mask_history": True, "popularity": True}},
}


@pytest.fixture
def tiny_decoder(tiny_lm: Any, tmp_path: Any) -> str:
    """Folder of a random two-layer Llama with the tokenizer of `tiny_lm`."""
    import shutil

    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path / "decoder")
    for file in tiny_lm.glob("*token*"):
        shutil.copy(file, tmp_path / "decoder")
    return str(tmp_path / "decoder")


def build(settings: dict[str, Any], decoder: str, variant: dict[str, Any]) -> tuple[LaserModel, PackedBatch]:
    values = {**settings, "lm": {**settings["lm"], "dtype": "bfloat16"}, "training": {}}
    for name, section in variant.items():
        if section == "decoder":
            section = {"path": decoder}
        if isinstance(section, dict):
            values[name] = {**values.get(name, {}), **section}
    config = build_config(LaserConfig, values)
    inputs = load_inputs(config)
    torch.manual_seed(0)
    model = build_laser(config, inputs, *load_language_model(config.lm))
    apply_execution(model.lm.model, Execution(checkpointing=config.execution.checkpointing))
    if model.item_side == "lm":
        model.refresh_items()
    if model.text is not None:
        model.text.fetch_vectors()
    rows = training_rows(inputs.split.train, 4).select([0, 5, 9, 30])
    negatives = rows.targets[:, None] ^ 1 if config.objective.candidates == "sampled" else None
    with_positives = config.objective.item_gradient == "positives"
    return model, model.builder.training_batch(rows, with_positives=with_positives, negatives=negatives)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_waits_once(
    name: str, tiny_settings: dict[str, Any], tiny_decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_settings, tiny_decoder, VARIANTS[name])
    model.lm.first_position  # noqa: B018, looked for once in the life of a model
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "device", GPU)
    with pretended_gpu(monkeypatch) as device:
        move(model)
        trainer = StageTrainer(accelerator, model, OptimizerConfig(), num_steps=3)
        model.train()
        waits = []

        def loss_of(part: PackedBatch) -> dict[str, Tensor]:
            return {name: value for name, value in model(part)._asdict().items() if value is not None}

        for _ in range(2):
            with record_backends() as ran:
                device.waits.clear()
                trainer._train_step(batch, loss_of, lambda rows: "rows")
                waits.append(list(device.waits))
    assert waits == [["tolist in loop.py:_check_finite"]] * 2
    assert any(backend.startswith("torch flash, bfloat16") for backend in ran), ran


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu_forward_and_backward_wait_for_nothing(
    name: str, tiny_settings: dict[str, Any], tiny_decoder: str
) -> None:
    model, batch = build(tiny_settings, tiny_decoder, VARIANTS[name])
    model.to("cuda").train()
    model(batch).loss.backward()  # kernels are compiled and tried, and tables made, the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with record_backends() as ran:
            model(batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(backend.startswith(("torch flash", "flash-attn")) for backend in ran), ran
