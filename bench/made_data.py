"""A log and a tokenizer out of nothing, for machines that have neither a data set nor a language model."""

import random
from pathlib import Path

_COLOURS = ("red", "blue", "green", "white", "black", "silver", "brown", "yellow")
_THINGS = ("bolt", "nut", "drill", "saw", "glove", "lamp", "rope", "brush", "hinge", "valve", "clamp", "screw", "file")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def made_log(folder: Path, *, users: int, items: int, events: int) -> dict[str, str]:
    """Users of so many events each who walk through the items, mostly to the next one: what `PrepareRequest` takes."""
    drawn = random.Random(0)
    titles = [
        f"{_COLOURS[index % len(_COLOURS)]} {_THINGS[index // len(_COLOURS) % len(_THINGS)]}" for index in range(items)
    ]
    rows = ["item_id,title,class", *(f"i{index},{title} {index},tool" for index, title in enumerate(titles))]
    (folder / "items.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = ["user_id,item_id,timestamp"]
    for user in range(users):
        place = drawn.randrange(items)
        for step in range(events):
            lines.append(f"u{user},i{place},{step}")
            place = (place + 1) % items if drawn.random() < 0.7 else drawn.randrange(items)
    (folder / "events.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"interactions": str(folder / "events.csv"), "items": str(folder / "items.csv")}


def made_tokenizer(folder: Path) -> str:
    """A folder with a tokenizer of words and single digits, of which any model knows the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *_COLOURS, *_THINGS, "tool", *map(str, range(10)), *",:;-()"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), digits])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")
