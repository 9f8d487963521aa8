"""Every system in one table: the same split, the same full ranking, intervals beside the figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laser_fast.data import Split
from laser_fast.evaluation.calibration_fit import fit_calibration
from laser_fast.evaluation.evaluate import evaluate
from laser_fast.evaluation.metrics import RankingMetrics, paired_difference, table
from laser_fast.laser.model import LaserModel
from laser_fast.models.text_scorers import TextSimilarity, text_vectors
from laser_fast.recommenders.baselines import Markov1, Popularity
from laser_fast.recommenders.item_to_item import ItemKNN, SequentialRules
from laser_fast.recommenders.protocol import Scorer

_METRIC = "NDCG@10"
_COLUMNS = ("HR@1", "HR@10", "NDCG@10", "MRR")
_RECENCY = 0.8  # weight of an item relative to the next newer one, as in ItemKNN
LASER = "Laser"
ZERO_SHOT = "zero-shot LM"


@dataclass(frozen=True)
class Comparison:
    """Metrics of all systems on the test rows, in the order of the table."""

    metrics: Mapping[str, RankingMetrics]
    rule: str

    def __str__(self) -> str:
        lines = [table(dict(self.metrics), _COLUMNS)]
        for other in self.metrics:
            if other != LASER:
                difference = paired_difference(self.metrics[LASER].ranks, self.metrics[other].ranks, _METRIC)
                lines.append(f"{LASER} - {other}: {_METRIC} {difference.mean:+.4f} +- {difference.ci95:.4f}")
        return "\n".join(
            [*lines, f"full ranking, history items not filtered; {self.rule}; +- are 95% intervals over users"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"rule": self.rule, "systems": {name: metrics.to_dict() for name, metrics in self.metrics.items()}}


def compare(
    model: LaserModel,
    split: Split,
    counts: Tensor,
    recommender: Scorer | None = None,
    *,
    tables: Mapping[str, Scorer],
    cached: Scorer | None = None,
    vectors: Tensor | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> Comparison:
    """Laser beside systems without a language model, and beside the frozen language model untrained.

    The calibrated lines have the repeat and popularity terms that Laser has: on data without repeats these matter more
    than anything else. The line to beat is the fusion without training, of the zero-shot scores of the last item and of
    the whole history, the recommender and the tables, with scalars fitted on validation.

    Args:
        counts: int64 [I], events of each item in the training part.
        recommender: the ID-based recommender; None leaves its line out.
        tables: scorers that Laser's calibrated score could add (`Inputs.tables`); the fusion and the cached line may
            add them too.
        cached: cached text vectors, trained without the language model (`training.text_stage`), which are calibrated
            together with the recommender and the tables; None leaves the line out.
        vectors: float32 [I, d], unit text vectors for the lines without training; None for those of the item prompts.
    """

    def calibrated(components: dict[str, Scorer]) -> Scorer:
        names = tuple(name for name in components if name not in tables)
        rows = split.valid
        return fit_calibration(components, rows, counts, standardize=names, batch_size=batch_size, progress=progress)[0]

    vectors = text_vectors(model.lm, model.builder) if vectors is None else vectors
    parts: dict[str, Scorer] = {"text_last": TextSimilarity(vectors), "text_history": TextSimilarity(vectors, _RECENCY)}
    train = split.train.items, split.train.cu_seqlens, model.num_items
    systems: dict[str, Scorer] = {
        "Popularity": Popularity.fit(*train),
        "Markov-1": Markov1.fit(*train),
        "ItemKNN": ItemKNN.fit(*train),
        "SequentialRules": SequentialRules.fit(*train),
    }
    if recommender is not None:
        name = type(recommender).__name__
        systems[name] = parts["recommender"] = recommender
        systems[f"{name}, calibrated"] = calibrated({"recommender": recommender})
    systems[ZERO_SHOT] = parts["text_last"]
    systems[f"{ZERO_SHOT}, calibrated"] = calibrated({"text_last": parts["text_last"]})
    systems["no-training fusion"] = calibrated(parts | dict(tables))
    if cached is not None:
        fused = {} if recommender is None else {"recommender": recommender}
        systems["cached text line"] = calibrated({"cached": cached, **fused, **tables})
    if model.calibration is not None:
        systems[f"{LASER}, cosine only"] = model
    systems[LASER] = model if model.calibration is None else model.calibration
    metrics = {name: evaluate(scorer, split.test, batch_size=batch_size) for name, scorer in systems.items()}
    return Comparison(metrics, split.rule)
