"""The README.md of a saved Laser: what it is, what it was trained on, how it is loaded, how good it was."""

import json

from huggingface_hub import ModelCard, ModelCardData

from laser_fast.laser.laser_files import LaserContents
from laser_fast.lm.loading.hub import HUB_SCHEME
from laser_fast.printable import escape_markdown, printable


def model_card(
    contents: LaserContents, *, repo_id: str | None = None, figures: dict[str, float] | None = None
) -> ModelCard:
    """Markdown with the metadata that the Hugging Face Hub reads.

    Args:
        repo_id: name under which it will be found; None = a local folder.
        figures: metrics to print, by name.
    """
    model, origin = contents.encoder, contents.origin
    on_hub = origin.lm.path.startswith(HUB_SCHEME)
    name = printable(origin.lm.path.removeprefix(HUB_SCHEME))
    around = escape_markdown(name if on_hub else f"a {origin.base['type']}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    recommender = "recommender" if model.recommender is None else type(model.recommender.recommender).__name__
    mformer = origin.config.mformer
    prefix = {
        "mformer": f"M-Former with {mformer.num_experts} query experts, {mformer.top_k} a user, over a frozen "
        + recommender,
        "linear": f"a linear map of the newest state of a frozen {recommender}",
        "shared": "one learned prefix for everybody",
        "none": "no prefix",
    }[origin.config.bituning.prefix]
    table = "".join(f"| {escape_markdown(key)} | {value:.4f} |\n" for key, value in (figures or {}).items())
    figures_section = f"| metric | value |\n|---|---|\n{table}\n" if table else ""
    tags = ["recommendation", "sequential-recommendation", "bi-tuning"]
    data = ModelCardData(library_name="laser_fast", tags=tags, base_model=name if on_hub else None)
    where = _quoted(repo_id or "this folder")
    llm = _quoted(origin.lm.path if on_hub else "folder of the language model")
    return ModelCard(f"""---
{data.to_yaml()}
---

# Laser: recommendations from a frozen language model

Trained parameters ({trained:,}) of a Laser (arXiv:2409.01605) around {around}, {origin.base["num_layers"]} layers of \
{origin.base["hidden_size"]}. The language model itself is not here.

- Catalogue: {model.num_items:,} items
- Prefix: {prefix}
- Split: {_short(origin.split_hash)}
- Tokenizer: {_short(origin.base["tokenizer"])}

{figures_section}```python
from laser_fast import LaserModel

model = LaserModel.from_pretrained({where}, llm={llm})
model.recommend([[{_quoted(model.item_ids[0])}]], k=5)  # item ids, the oldest first
```

Another language model or tokenizer than the one it was trained with is refused.
""")


def _quoted(text: str) -> str:
    """`text` as Python writes it, without what would end a block of code in Markdown."""
    return printable(json.dumps(text, ensure_ascii=False)).replace("`", "\\x60")


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else f"SHA-256 {digest[:12]}"
