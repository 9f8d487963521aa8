"""What is measured: shapes of the Laser authors' M-Former and of the demo, lengths of texts, and in which modes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Every tenth percentile of the tokens of a training prompt (10 newest items, tokenizer of MiniLM, special tokens
# included), of 20,000 rows drawn from the data sets as `laser-fast prepare` writes them.
LENGTHS = {
    "movielens-100k": [7, 84, 91, 94, 97, 99, 102, 104, 108, 113, 153],
    "amazon-scientific": [6, 24, 31, 38, 53, 64, 80, 101, 127, 175, 331],
}
# The same of the text of one item (at most 32 tokens and the special ones), over the catalogue: title and classes of
# a film, title and brand of a product.
ITEM_LENGTHS = {
    "movielens-100k": [4, 5, 6, 6, 7, 7, 8, 9, 10, 12, 27],
    "amazon-scientific": [6, 16, 19, 22, 25, 27, 29, 32, 34, 34, 34],
}
CATALOGUE = {"movielens-100k": 1682, "amazon-scientific": 3686}


def draw_lengths(dataset: str, count: int, table: dict[str, list[int]] = LENGTHS, *, seed: int = 0) -> Tensor:
    """int64 [count], drawn from the percentiles."""
    place = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    values = torch.tensor(table[dataset], dtype=torch.float64)
    low = place.floor().long()
    return (values[low] + (place - low) * (values[low + 1] - values[low])).round().long()


class Workload(NamedTuple):
    """A batch: every user has `items` items, so that a padded batch has no padding.

    The state of an item and a query token are `width` wide; an expert has `queries` tokens.
    """

    device: str
    users: int
    items: int
    width: int
    queries: int
    dtype: torch.dtype
    experts: int = 8
    top_k: int = 3


Draw = Callable[..., Tensor]  # of sizes, to standard normal numbers, float32


def random_draw(shape: Workload) -> Draw:
    """Draws on the device of the workload: on the host the larger ones would take longer than everything measured."""
    generator = torch.Generator(shape.device).manual_seed(0)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=shape.device)


class Case(NamedTuple):
    """A workload and how it is run: plain, or replayed in a CUDA graph with a cold cache (`graph`) or a warm one."""

    name: str
    mode: str
    workload: Workload

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}"


def case_name(case: tuple[object, ...]) -> str:
    """The id of a case that is a tuple."""
    return "-".join(map(str, case))


def _cases(workloads: dict[str, Workload]) -> list[Case]:
    cases = []
    for name, workload in workloads.items():
        modes = {"cpu": ["plain"], "cuda": ["plain", "graph"]}[workload.device]
        if name == "gpu-small":  # fits into the cache, so there it matters what is in it
            modes.append("graph-warm")
        cases += [Case(name, mode, workload) for mode in modes]
    return cases


# 8 experts, 3 chosen, 32 query tokens of 768 are the Laser authors'; the demo's preset has 4 tokens of 128
_CPU = {
    "cpu-demo": Workload("cpu", 256, 20, 128, 4, torch.float32),
    "cpu-256": Workload("cpu", 256, 20, 256, 4, torch.float32),
    "cpu-paper": Workload("cpu", 256, 20, 768, 32, torch.float32),
}
_SMALL = {"gpu-small": Workload("cuda", 256, 20, 768, 32, torch.bfloat16)}
ROUTING = _cases(_CPU | _SMALL | {"gpu-large": Workload("cuda", 8192, 50, 768, 32, torch.bfloat16)})
DISPATCH = _cases(_CPU | _SMALL | {"gpu-large": Workload("cuda", 2048, 20, 768, 32, torch.bfloat16)})
