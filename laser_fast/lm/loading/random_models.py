"""Language models of any size with random weights, for tests, benchmarks and memory plans without a checkpoint.

In 4 bits the packed weights themselves are drawn, so that an 8B model never holds a weight in 16 bits.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laser_fast.config import resolve_path
from laser_fast.lm.loading.embedding_tables import OneRowEmbedding

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SHAPES = Path(__file__).resolve().parents[2] / "presets" / "shapes"
_BLOCK_SIZE = 64  # weights that share a scale, and scales that share one: the defaults of bitsandbytes
_NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Placement:
    """Where a random model lies and in which form."""

    dtype: torch.dtype  # of embeddings and norms, and of what the linear layers compute in
    device: torch.device  # of the layers, where weights are drawn
    embedding_device: torch.device  # of the table of token embeddings
    packed: bool = False  # linear weights in NF4 with double quantisation, as bitsandbytes holds them
    # False = one row on `device`, for a model that is given embeddings: they are a quarter of an 8B model in 4 bits
    token_embeddings: bool = True


def known_shapes() -> list[str]:
    """Names that `random_config` knows without a folder."""
    return sorted(file.stem for file in _SHAPES.glob("*.json"))


def random_config(shape: str) -> "PretrainedConfig":
    """The transformers configuration of a shape: one of `known_shapes`, or a folder with a config.json."""
    from transformers import AutoConfig

    file = _SHAPES / f"{shape}.json" if shape in known_shapes() else Path()
    if not file.is_file():
        with suppress(FileNotFoundError):
            file = resolve_path(shape) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"random_config: the shape must be a folder with a config.json or one of {', '.join(known_shapes())}; "
            f"got {shape!r}"
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("quantization_config", None)  # says how stored weights are packed, and there are none
    kind = values.get("model_type")
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"random_config: model_type of {shape!r} must be an architecture of transformers, got {kind!r}"
        ) from error


def random_model(config: "PretrainedConfig", placement: Placement, *, seed: int = 0) -> "PreTrainedModel":
    """Build a model without a head and draw its weights: the same for the same seed, device and dtype.

    Weights are initialised as the class does it. With `placement.packed` the 4-bit codes of linear layers are drawn
    uniformly and the scales of blocks are those of normal weights, up to a factor that gives the unpacked weights the
    configuration's `initializer_range` as standard deviation.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=placement.dtype)
    if not placement.token_embeddings:
        model.set_input_embeddings(OneRowEmbedding(model.get_input_embeddings()))
        placement = replace(placement, embedding_device=placement.device)
    devices = {device for device in (placement.device, placement.embedding_device) if device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        torch.manual_seed(seed)
        _materialise(model, placement)
        if placement.packed:
            deviation = getattr(config.get_text_config(), "initializer_range", None) or 0.02
            _pack(model, placement, deviation, torch.Generator(placement.device).manual_seed(seed))
    return model.requires_grad_(False).eval()


def _materialise(model: "PreTrainedModel", placement: Placement) -> None:
    """Give memory and an initial value to all but the linear weights that will be packed."""
    table = model.get_input_embeddings()
    of_table = set(table.modules())
    # a GPU draws the table of an 8B model at once, one core of the host in ten seconds
    first = placement.device if placement.device.type == "cuda" else placement.embedding_device
    names = {module: name for name, module in model.named_modules()}
    children_first: list[nn.Module] = []  # a parent may overwrite what its children drew
    model.apply(children_first.append)
    for module in dict.fromkeys(children_first):
        device = first if module in of_table else placement.device
        later = {"weight"} if placement.packed and type(module) is nn.Linear else set()
        for key, parameter in module._parameters.items():
            if parameter is not None and key not in later:
                module._parameters[key] = nn.Parameter(_unwritten(parameter, device), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _unwritten(buffer, device)
        model._init_weights(module)
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and key not in later and _is_unwritten(value):
                raise RuntimeError(
                    f"random_model: {type(model).__name__} must initialise {names[module]}.{key}, "
                    "got a class that does not"
                )
    table.to(placement.embedding_device)


def _unwritten(like: Tensor, device: torch.device) -> Tensor:
    """Memory filled with a value that no initialisation leaves there."""
    value: Any = torch.nan
    if not like.is_floating_point():
        value = True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full(like.shape, value, dtype=like.dtype, device=device)


def _is_unwritten(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return False
    ends = tensor.flatten()[:: max(1, tensor.numel() - 1)]  # the first and the last element
    return bool((ends.isnan() if tensor.is_floating_point() else ends == torch.iinfo(tensor.dtype).max).any())


def _pack(model: nn.Module, placement: Placement, deviation: float, generator: torch.Generator) -> None:
    """Replace every linear layer by one in 4 bits with random codes."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if not linears:
        raise ValueError(f"random_model: a model in 4 bits must have linear layers, got none in {type(model).__name__}")
    for name, linear in linears.items():
        model.set_submodule(name, _random_linear(linear, placement.dtype, deviation, generator))


def _random_linear(linear: nn.Linear, dtype: torch.dtype, deviation: float, generator: torch.Generator) -> nn.Module:
    """A `Linear4bit` of this shape with the bias of `linear`; the host does not wait for a GPU."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta", **options)
    layer.bias = linear.bias
    num_weights = linear.in_features * linear.out_features
    code = get_4bit_type("nf4", device=generator.device)
    scales = _random_scales(math.ceil(num_weights / _BLOCK_SIZE), generator)
    scales *= deviation / (scales.square().mean() * code.square().mean()).sqrt()
    offset = scales.mean()
    absmax, nested = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK_SIZE)
    shape = torch.Size((linear.out_features, linear.in_features))
    form = {"blocksize": _BLOCK_SIZE, "quant_type": "nf4", "dtype": dtype}
    state = QuantState(absmax=absmax, shape=shape, code=code, offset=offset, state2=nested, **form)
    # bytes are drawn eight at a time, which is three times as fast
    words = torch.empty(math.ceil(num_weights / 16), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    codes = words.view(torch.uint8)[: math.ceil(num_weights / 2), None]
    layer.weight = Params4bit(
        codes, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=layer
    )
    layer.quant_state = state
    return layer


def _random_scales(num_blocks: int, generator: torch.Generator) -> Tensor:
    """For every block the largest magnitude of `_BLOCK_SIZE` standard normal numbers: float32 [num_blocks]."""
    uniform = torch.rand(num_blocks, generator=generator, device=generator.device, dtype=torch.float32)
    # a number's magnitude is below x with probability erf(x / sqrt 2), all of a block's with the power of it
    power = uniform.clamp(1e-6, 1 - 1e-6).pow(1 / _BLOCK_SIZE)
    return torch.erfinv(power) * math.sqrt(2)
