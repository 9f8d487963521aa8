"""A scorer of given scores."""

import pytest
from torch import Tensor


class Fixed:
    """Gives prepared scores, row by row, and remembers how many at a time."""

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.num_items, self.batches = scores, scores.shape[1], list[int]()

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        start = sum(self.batches)
        self.batches.append(cu_seqlens.numel() - 1)
        return self.scores[start : start + self.batches[-1]]


@pytest.fixture(scope="session")
def fixed_scores() -> type[Fixed]:
    """`fixed_scores(scores [B, I])`: a scorer that gives them, row by row."""
    return Fixed
