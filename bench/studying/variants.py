"""What the study varies: a name, and the settings in which a run differs from the configuration it is given."""

from dataclasses import dataclass
from typing import Any

REFERENCE = "shared prefix"
CACHED = "cached text line"
MFORMER = "M-Former, cross-fitted states"
_MFORMER = {"bituning.prefix": "mformer"}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: in tables and file names.
        question: what its difference to the variant `against` answers.
        settings: dotted keys of the configuration.
        own_text: trains its text residual itself, instead of beginning with that of the cached line.
        against: name of another variant.
        recommender: what the name of its recommender's folder ends in, behind that of the configuration.
    """

    name: str
    question: str
    settings: dict[str, Any]
    own_text: bool = False
    against: str = REFERENCE
    recommender: str = ""


_ALL = (
    Variant(
        CACHED,
        "no language model in training: the text stage alone",
        {"bituning.prefix": "shared", "training.phase_a.epochs": 0, "training.phase_b.epochs": 0},
        own_text=True,
    ),
    Variant(REFERENCE, "the reference: no ID input to the language model", {"bituning.prefix": "shared"}),
    Variant("no prefix", "virtual tokens in front of the text or none", {"bituning.prefix": "none"}),
    Variant(
        "linear prefix",
        "a prefix per user without a transformer, from cross-fitted states",
        {"bituning.prefix": "linear", "mformer.states": "cross-fitted"},
    ),
    Variant(
        "linear prefix, in-sample states",
        "and from those of the published recipe",
        {"bituning.prefix": "linear", "mformer.states": "in-sample"},
        against="linear prefix",
    ),
    Variant(
        MFORMER,
        "a prefix per user from states that have not seen the user",
        _MFORMER | {"mformer.states": "cross-fitted"},
    ),
    Variant(
        "M-Former, folds with the full model's items",
        "fold designs: folds that share the finished item embeddings",
        _MFORMER | {"mformer.states": "cross-fitted"},
        against=MFORMER,
        recommender="-shared",
    ),
    Variant(
        "M-Former, folds from starts of their own",
        "and folds whose states are not rotated onto those of the full model",
        _MFORMER | {"mformer.states": "cross-fitted"},
        against=MFORMER,
        recommender="-own",
    ),
    Variant(
        "M-Former, in-sample states",
        "the published recipe's states",
        _MFORMER | {"mformer.states": "in-sample"},
        against=MFORMER,
    ),
    Variant(
        "M-Former, 1 expert",
        "a querying transformer without a mixture",
        _MFORMER | {"mformer.num_experts": 1, "mformer.top_k": 1},
        against=MFORMER,
    ),
    Variant("M-Former, k = 1", "one expert a user", _MFORMER | {"mformer.top_k": 1}, against=MFORMER),
    Variant("M-Former, k = 3", "three experts a user", _MFORMER | {"mformer.top_k": 3}, against=MFORMER),
    Variant("M-Former, stage 1", "M-Former pre-trained", _MFORMER | {"training.pretrain.epochs": 1}, against=MFORMER),
    Variant("read-out at the suffix", "suffix or mean", {"bituning.prefix": "shared", "bituning.readout": "suffix"}),
    Variant(
        "items by the language model",
        "item embeddings from the language model too, or from cached texts alone",
        {"bituning.prefix": "shared", "text.item_side": "lm"},
    ),
    Variant("oldest item first", "item order", {"bituning.prefix": "shared", "prompt.newest_first": False}),
    Variant(
        "prompt first",
        "words before the prefix or behind it",
        {"bituning.prefix": "shared", "prompt.order": "prompt-first", "prompt.reuse_instruction": False},
    ),
    Variant(
        "10 items", "history length", {"bituning.prefix": "shared", "prompt.max_items": 10, "prompt.max_tokens": 192}
    ),
    Variant("phases A and B", "then V frozen", {"bituning.prefix": "shared", "training.phase_b.epochs": 1}),
    Variant(
        "no text residual",
        "the paper's embeddings, with M-Former on in-sample states",
        _MFORMER
        | {
            "mformer.states": "in-sample",
            "text.residual": False,
            "text.item_side": "lm",
            "training.text.epochs": 0,
            "objective.mask_history": False,
            "objective.popularity": False,
        },
        own_text=True,
        against="M-Former, in-sample states",
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}
