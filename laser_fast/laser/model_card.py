"""The README.md of a saved Laser: what it is, what it was trained on, how it is loaded, how good it was."""

import json
from typing import TYPE_CHECKING, Any

from laser_fast.laser.laser_files import origin_of
from laser_fast.printable import escape_markdown, printable

if TYPE_CHECKING:
    from laser_fast.laser.model import LaserModel

_BASE_SCHEME = "hub:"


def model_card(model: "LaserModel", *, repo_id: str | None = None, figures: dict[str, Any] | None = None) -> str:
    """Markdown with the metadata that the Hugging Face Hub reads.

    Args:
        repo_id: name under which it will be found; None = a local folder.
        figures: metrics to print, by name.
    """
    origin = origin_of(model)
    base = origin.lm.path
    on_hub = base.startswith(_BASE_SCHEME)
    name = base.removeprefix(_BASE_SCHEME)
    around = escape_markdown(name if on_hub else f"a {origin.base['type']}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    prefix = origin.config.bituning.prefix
    writer = {
        "mformer": f"M-Former with {origin.config.mformer.num_experts} query experts, "
        f"{origin.config.mformer.top_k} a user, over a frozen {_recommender_name(model)}",
        "linear": f"a linear map of the newest state of a frozen {_recommender_name(model)}",
        "shared": "one learned prefix for everybody",
        "none": "no prefix",
    }[prefix]
    metadata = ["library_name: laser_fast", "tags:", "- recommendation", "- sequential-recommendation", "- bi-tuning"]
    metadata += [f"base_model: {printable(name)}"] if on_hub else []
    lines = ["---", *metadata, "---", "", "# Laser: recommendations from a frozen language model", ""]
    lines += [
        f"Trained parameters ({trained:,}) of a Laser (arXiv:2409.01605) around {around}, "
        f"{origin.base['num_layers']} layers of {origin.base['hidden_size']}. The language model itself is not here.",
        "",
        f"- Catalogue: {model.num_items:,} items",
        f"- Prefix: {writer}",
        f"- Split: {_short(origin.split_hash)}",
        f"- Tokenizer: {_short(origin.base['tokenizer'])}",
        "",
    ]
    if figures:
        lines += [
            "| metric | value |",
            "|---|---|",
            *(f"| {escape_markdown(key)} | {value:.4f} |" for key, value in figures.items()),
            "",
        ]
    where = _quoted(repo_id or "this folder")
    llm = ", llm=" + _quoted(base if on_hub else "folder of the language model")
    lines += [
        "```python",
        "from laser_fast import LaserModel",
        "",
        f"model = LaserModel.from_pretrained({where}{llm})",
        f"model.recommend([[{_quoted(model.item_ids[0])}]], k=5)  # item ids, the oldest first",
        "```",
        "",
        "Another language model or tokenizer than the one it was trained with is refused.",
        "",
    ]
    return "\n".join(lines)


def _recommender_name(model: "LaserModel") -> str:
    return "recommender" if model.recommender is None else type(model.recommender.recommender).__name__


def _quoted(text: str) -> str:
    """`text` as Python writes it, without what would end a block of code in Markdown."""
    return printable(json.dumps(text, ensure_ascii=False)).replace("`", "\\x60")


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else f"SHA-256 {digest[:12]}"
