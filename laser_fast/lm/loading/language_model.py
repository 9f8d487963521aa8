"""Loading the frozen language model: from a folder, packed in 4 bits on the way, or with random weights."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from laser_fast.config import LanguageModelConfig, resolve_path
from laser_fast.data.tokens import Tokenizer
from laser_fast.lm.loading.embedding_tables import HostEmbedding
from laser_fast.lm.loading.hub import HUB_SCHEME, commit_of, fetched_before, find_folder, locate
from laser_fast.lm.loading.lazy_tensors import lazy_tensors, refuse_damaged_weights
from laser_fast.lm.loading.random_models import Placement, random_config, random_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANDOM_SCHEME = "random:"


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A language model, its tokenizer, and the settings that say where both came from."""

    model: "PreTrainedModel"
    tokenizer: Tokenizer
    settings: LanguageModelConfig


def load_base(
    source: str | Path | nn.Module,
    tokenizer: Tokenizer | str | None,
    settings: LanguageModelConfig,
    revision: str | None,
    local_files_only: bool,
) -> LoadedBase:
    """The language model that a user names, or has loaded, with its tokenizer.

    Args:
        source: a folder, package, hub repository or random shape, or a loaded model.
        tokenizer: a tokenizer, or where it is; None = that of the source.
        settings: how to load; the locations in it are ignored.
        revision, local_files_only: as in `hub.fetch`.

    Raises:
        FileNotFoundError: a folder, package or repository does not exist.
        ValueError: a loaded model without a tokenizer, or damaged weights.
    """
    own, named = (None, tokenizer) if isinstance(tokenizer, str) else (tokenizer, None)
    loaded = isinstance(source, nn.Module)
    path = str(getattr(source, "name_or_path", "") or "") if loaded else str(source)
    settings = local = settings.model_copy(update={"path": path, "tokenizer": named})
    if loaded:
        if own is None and not named and not path:
            raise ValueError("from_pretrained: tokenizer must be given with a loaded language model, got None")
        if path and not Path(path).is_dir():  # transformers keeps the name on the hub
            settings = local = settings.model_copy(update={"path": HUB_SCHEME + path})
    elif not path.startswith(RANDOM_SCHEME):
        folder = find_folder(path, revision, local_files_only)
        local = settings.model_copy(update={"path": str(folder)})
        by_name = not path.startswith(HUB_SCHEME) and not Path(path).expanduser().exists()
        if by_name and commit_of(folder) is not None:
            settings = settings.model_copy(update={"path": HUB_SCHEME + path})
    model = cast("PreTrainedModel", source) if loaded else load_model(local)
    return LoadedBase(model, own or load_tokenizer(local, local_files_only=local_files_only), settings)


def lm_of_saved(
    settings: LanguageModelConfig, revision: str | None, llm: object = None, tokenizer: object = None
) -> LanguageModelConfig:
    """The settings of a saved model with local folders in them; what they name on the hub comes out of its cache.

    Args:
        revision: commit of the language model it was trained with.
        llm, tokenizer: what the caller names instead; None = nothing.
    """
    found = {"path": str(llm)} if isinstance(llm, str | Path) else {}
    if llm is None and not settings.path.startswith(RANDOM_SCHEME):
        on_hub = settings.path.startswith(HUB_SCHEME)
        folder = fetched_before(settings.path, revision, "llm") if on_hub else resolve_path(settings.path, "llm")
        found["path"] = str(folder)
    if tokenizer is None and settings.tokenizer is not None and settings.tokenizer.startswith(HUB_SCHEME):
        found["tokenizer"] = str(fetched_before(settings.tokenizer, None, "tokenizer"))
    return settings.model_copy(update=found)


def load_language_model(config: LanguageModelConfig) -> "tuple[PreTrainedModel, Any]":
    """Read model and tokenizer; only what `hub:` names is downloaded, and no code of a folder is run."""
    tokenizer = load_tokenizer(config)
    model = load_model(config)
    rows = model.get_input_embeddings().weight.shape[0]
    if config.tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"load_language_model: lm.tokenizer must have at most the {rows} tokens of {config.path!r}, "
            f"got {len(tokenizer)}"
        )
    return model, tokenizer


def load_tokenizer(config: LanguageModelConfig, *, local_files_only: bool = False) -> Any:
    """Read the tokenizer alone."""
    from transformers import AutoTokenizer

    if config.tokenizer is None and config.path.startswith(RANDOM_SCHEME):
        raise ValueError(
            f"load_language_model: lm.tokenizer must name a folder with a tokenizer when lm.path is {config.path!r}, "
            "got None"
        )
    named = (config.path, "lm.path") if config.tokenizer is None else (config.tokenizer, "lm.tokenizer")
    folder = locate(*named, local_files_only=local_files_only)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(config: LanguageModelConfig) -> "PreTrainedModel":
    """Read or draw the model alone, without a head and in evaluation mode.

    With `quantization` "nf4" every linear layer is quantised as it is read, on the device that will run the model (the
    GPU if there is one). Memory then holds the packed model, its embeddings and one unpacked layer. A random model is
    drawn on that device; a model that is read unpacked starts on the host.
    """
    # few CPUs multiply bfloat16 natively; on the others it is ten times slower than float32
    default = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else default
    pack = config.quantization == "nf4"
    if pack and importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError(
            'load_language_model: lm.quantization "nf4" needs bitsandbytes, got none; pip install "laser-fast[4bit]"'
        )
    if config.path.startswith(RANDOM_SCHEME):
        device = _device()
        embedding_device = torch.device("cpu") if config.embedding_device == "cpu" else device
        placement = Placement(dtype, device, embedding_device, packed=pack)
        model = random_model(random_config(config.path.removeprefix(RANDOM_SCHEME)), placement)
    else:
        model = _read(locate(config.path, "lm.path"), dtype, pack=pack)
    if config.embedding_device == "cpu":
        model.set_input_embeddings(HostEmbedding(model.get_input_embeddings()))
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
    logging.disable_progress_bar()  # not one bar at every start of a command
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
    """Where the model will run."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
