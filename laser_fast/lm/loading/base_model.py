"""The frozen language model below a Laser: where it is loaded from, and what is remembered of it, so that trained
parameters are never put on another one."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from laser_fast.config import LanguageModelConfig, resolve_path
from laser_fast.data.tokens import Tokenizer
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.hub import HUB_SCHEME, commit_of, fetched_before, find_folder
from laser_fast.lm.loading.language_model import RANDOM_SCHEME, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 16  # entries of the token embeddings
_VECTORS = 512  # norms and biases, of which the length is kept
_TOLERANCE = 0.01  # a weight rounded to bfloat16 is off by at most 0.4 %
_PROBE = "Laser reads: items, 1999 (naïve) & more…"


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """A language model with its tokenizer, and what is to be recorded of where they came from."""

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
    """The language model of a new Laser, or of a saved one, on the CPU or wherever a loaded one is.

    Args:
        source: a folder, package, hub repository or random shape, or a loaded model.
        tokenizer: one, or where it is; None = that of the source.
        settings: how it is loaded; of what it names nothing counts.
        revision, local_files_only: as in `hub.fetch`.

    Raises:
        FileNotFoundError: a folder, package or repository does not exist.
        ValueError: a loaded model without a tokenizer, or a damaged one.
    """
    own, folder_of_tokenizer = (None, tokenizer) if isinstance(tokenizer, str) else (tokenizer, None)
    if isinstance(source, nn.Module):
        model = cast("PreTrainedModel", source)
        path = str(getattr(model, "name_or_path", "") or "")
        if path and not Path(path).is_dir():  # transformers keeps the name on the hub
            path = HUB_SCHEME + path
        settings = settings.model_copy(update={"path": path, "tokenizer": folder_of_tokenizer})
        if own is None and not settings.tokenizer and not path:
            raise ValueError("from_pretrained: tokenizer must be given with a loaded language model, got None")
        return LoadedBase(model, own or _load_tokenizer(settings, local_files_only), settings)
    settings = settings.model_copy(update={"path": str(source), "tokenizer": folder_of_tokenizer})
    local = settings
    if not settings.path.startswith(RANDOM_SCHEME):
        folder = find_folder(settings.path, revision, local_files_only)
        local = settings.model_copy(update={"path": str(folder)})
        by_name = not settings.path.startswith(HUB_SCHEME) and not Path(settings.path).expanduser().exists()
        if by_name and commit_of(folder) is not None:
            settings = settings.model_copy(update={"path": HUB_SCHEME + settings.path})
    return LoadedBase(load_model(local), own or _load_tokenizer(local, local_files_only), settings)


def _load_tokenizer(settings: LanguageModelConfig, local_files_only: bool) -> Tokenizer:
    location = settings.tokenizer or settings.path
    if location.startswith(HUB_SCHEME):
        settings = settings.model_copy(update={"tokenizer": str(find_folder(location, None, local_files_only))})
    return cast("Tokenizer", load_tokenizer(settings))


def lm_of_saved(
    settings: LanguageModelConfig, revision: str | None, llm: object = None, tokenizer: object = None
) -> LanguageModelConfig:
    """The settings that a saved model records, with local folders in place of what they name: files out of the cache of
    the hub, because a file that somebody gave away may not send this process to the net.

    Args:
        revision: commit of the language model it was trained with.
        llm, tokenizer: what the caller names in their place; None = nothing.

    Raises:
        FileNotFoundError: there is no such folder or package.
        ValueError: the cache does not have a repository that they name.
    """
    found = {"path": str(llm)} if isinstance(llm, str | Path) else {}
    if llm is None and not settings.path.startswith(RANDOM_SCHEME):
        on_hub = settings.path.startswith(HUB_SCHEME)
        folder = fetched_before(settings.path, revision, "llm") if on_hub else resolve_path(settings.path, "llm")
        found["path"] = str(folder)
    if tokenizer is None and settings.tokenizer is not None and settings.tokenizer.startswith(HUB_SCHEME):
        found["tokenizer"] = str(fetched_before(settings.tokenizer, None, "tokenizer"))
    return settings.model_copy(update=found)


def describe_base(lm: FrozenLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind, sizes, a sample of the weights and a hash of the tokenizer, as JSON.

    The sample is of tensors that stay unpacked in 4 bits, so a model is recognised in any precision; nothing of a
    pooler, which is not used, and which a model that was loaded with another head does not have.
    """
    model = lm.model
    config = model.config.get_text_config()
    table = model.get_input_embeddings().weight.detach()
    places = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
    rows, columns = ((places * (size - 1)).round().long().to(table.device) for size in table.shape)
    named = sorted(model.named_parameters())
    vectors = [value.detach() for name, value in named if value.dim() == 1 and "pooler." not in name]
    vectors = vectors[:: max(1, len(vectors) // _VECTORS)]
    return {
        "type": type(model).__name__,
        "hidden_size": lm.hidden_size,
        "num_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": table.shape[0],
        "causal": lm.causal,
        "embeddings": [float(value) for value in table[rows, columns].float()],
        "vectors": [float(vector.float().norm()) for vector in vectors],
        "tokenizer": tokenizer_hash(tokenizer),
        "revision": commit_of(Path(model.name_or_path or "")) or getattr(model.config, "_commit_hash", None),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What tells two descriptions of a base apart, in words; a commit alone is no difference."""
    found = []
    for name, before in saved.items():
        value = now.get(name)
        if isinstance(before, list):
            if not _alike(before, value or []):
                found.append(f"other weights ({name})")
        elif name == "tokenizer" and before != value:
            found.append(f"tokenizer {str(value)[:12]} instead of {str(before)[:12]}")
        elif before != value and name != "revision":
            found.append(f"{name} {value} instead of {before}")
    if found and saved.get("revision") != now.get("revision"):
        found.append(f"revision {now.get('revision')} instead of {saved.get('revision')}")
    return found


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, and the tokens of a sentence with and without special ones."""
    digest = hashlib.sha256()
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    for special in (False, True):
        digest.update(json.dumps(list(tokenizer(_PROBE, add_special_tokens=special)["input_ids"])).encode())
    return digest.hexdigest()


def _alike(before: list[float], now: list[float]) -> bool:
    largest = max((abs(value) for value in before), default=0.0)
    return len(before) == len(now) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-3 * largest) for a, b in zip(before, now, strict=True)
    )
