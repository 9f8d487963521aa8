"""Loading the frozen language model: from a folder, packed in 4 bits on the way, or with random weights."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from laser_fast.config import LanguageModelConfig
from laser_fast.lm.execution.host_embedding import keep_embeddings_on_host
from laser_fast.lm.loading.hub import locate
from laser_fast.lm.loading.lazy_tensors import lazy_tensors, refuse_damaged_weights
from laser_fast.lm.loading.random_models import Placement, random_config, random_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANDOM_SCHEME = "random:"


def load_language_model(config: LanguageModelConfig) -> "tuple[PreTrainedModel, Any]":
    """Read model and tokenizer; nothing is downloaded but what `hub:` names, and no code of a folder is run.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `load_tokenizer` and `load_model`.
        ValueError: the tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    rows = model.get_input_embeddings().weight.shape[0]
    if config.tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"load_language_model: lm.tokenizer must have at most the {rows} tokens of {config.path!r}, "
            f"got {len(tokenizer)}"
        )
    return model, tokenizer


def load_tokenizer(config: LanguageModelConfig) -> Any:
    """Read the tokenizer alone.

    Raises:
        FileNotFoundError: no such folder or package.
        ValueError: a random model without a tokenizer.
    """
    from transformers import AutoTokenizer

    if config.tokenizer is None and config.path.startswith(RANDOM_SCHEME):
        raise ValueError(
            f"load_language_model: lm.tokenizer must name a folder with a tokenizer when lm.path is {config.path!r}, "
            "got None"
        )
    named = (config.path, "lm.path") if config.tokenizer is None else (config.tokenizer, "lm.tokenizer")
    return AutoTokenizer.from_pretrained(locate(*named), local_files_only=True)


def load_model(config: LanguageModelConfig) -> "PreTrainedModel":
    """Read or draw the model alone, without a head, frozen by nobody yet and in evaluation mode.

    With `quantization` "nf4" every linear layer is quantised as it is read, one tensor at a time and straight to the
    device that will run the model (the GPU if there is one), so that memory holds the packed model, its embeddings and
    one layer; backward keeps the packed weights alone. A random model is drawn on that device; one that is read
    unpacked starts on the host.

    Raises:
        FileNotFoundError: no such folder or package.
        RuntimeError: 4-bit weights are asked for and bitsandbytes is not installed.
        ValueError: a random model of an unknown shape.
    """
    # few CPUs multiply bfloat16 natively; on one that does not it is ten times slower than float32
    default = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else default
    if config.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(
            'load_language_model: lm.quantization "nf4" needs bitsandbytes, got none; pip install "laser-fast[4bit]"'
        )
    if config.path.startswith(RANDOM_SCHEME):
        device = _device()
        embedding_device = torch.device("cpu") if config.embedding_device == "cpu" else device
        placement = Placement(dtype, device, embedding_device, packed=config.quantization == "nf4")
        model = random_model(random_config(config.path.removeprefix(RANDOM_SCHEME)), placement)
    else:
        model = _read(locate(config.path, "lm.path"), dtype, pack=config.quantization == "nf4")
    if config.embedding_device == "cpu":
        keep_embeddings_on_host(model)
    return model


def _read(folder: Path, dtype: torch.dtype, *, pack: bool) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig
    from transformers.utils import logging

    refuse_damaged_weights(folder)  # transformers does not name the damaged file
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    packed_already = getattr(config, "quantization_config", None) is not None
    options: dict[str, Any] = {"dtype": dtype}
    tensors = None
    if pack or packed_already:
        options["device_map"] = {"": _device()}
        tensors = lazy_tensors(folder, dtype if _device().type == "cpu" else None, skip=("lm_head.",))
    if pack and not packed_already:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for every start of every command says nothing
    try:
        if tensors is None:
            model = AutoModel.from_pretrained(folder, local_files_only=True, **options)
        else:
            with torch.device("meta"):
                kind = type(AutoModel.from_config(config))
            model = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
            model.config.name_or_path = model.name_or_path = str(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model


def _device() -> torch.device:
    """The one that will run the model."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
