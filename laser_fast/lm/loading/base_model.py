"""What a Laser remembers of its language model, so that trained parameters are never put on another one."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from laser_fast.data.tokens import Tokenizer
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.hub import commit_of

_SAMPLES = 16  # entries of the token embeddings
_VECTORS = 512  # norms and biases, of which the length is kept
_TOLERANCE = 0.01  # a weight rounded to bfloat16 is off by at most 0.4 %
_PROBE = "Laser reads: items, 1999 (naïve) & more…"


def describe_base(lm: FrozenLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind, sizes, a sample of the weights and a hash of the tokenizer, as JSON.

    The sample is of tensors that 4-bit models leave unpacked, so a model is recognised in any precision. It leaves out
    a pooler, which is not used and which a model loaded with another head lacks.
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
        "tokenizer": _tokenizer_hash(tokenizer),
        "revision": commit_of(Path(model.name_or_path or "")) or getattr(model.config, "_commit_hash", None),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two descriptions of a base differ, in words; another commit alone is no difference."""
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


def _tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary and of the tokens of one sentence, with and without special ones."""
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
