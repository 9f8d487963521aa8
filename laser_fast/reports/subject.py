"""What a report is about beside the run's own files: the model that was kept, and the data it was built on."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from laser_fast.data import SequenceDataset, Split
from laser_fast.evaluation.comparison import LASER, Comparison
from laser_fast.evaluation.metrics import MetricValue
from laser_fast.laser.model import LaserModel
from laser_fast.recommenders.protocol import Scorer


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded run.

    Attributes:
        model: in evaluation mode, with its item matrix and, where the run has one, its calibration.
        counts: int64 [I], events of each item in the training part.
        recommender: the ID-based recommender; None where the run has none.
        tables: what was counted in the training part and Laser's calibrated score could add, see `compare`.
        batch_size: rows scored at a time.
    """

    model: LaserModel
    dataset: SequenceDataset
    split: Split
    counts: Tensor
    recommender: Scorer | None
    tables: Mapping[str, Scorer]
    batch_size: int = 128

    @property
    def scorer(self) -> Scorer:
        """What recommends: the calibrated score where there is one."""
        return self.model if self.model.calibration is None else self.model.calibration


def rival(subject: Subject, comparison: Comparison) -> str:
    """The system that stands beside Laser: the recommender, with the terms of the calibrated score where Laser has
    them; without a recommender, ItemKNN."""
    if subject.recommender is None:
        return "ItemKNN"
    name = type(subject.recommender).__name__
    calibrated = f"{name}, calibrated"
    return calibrated if subject.model.calibration is not None and calibrated in comparison.metrics else name


def shown_systems(subject: Subject, comparison: Comparison) -> list[str]:
    """Laser, its rival, and the rival's plain score."""
    other = rival(subject, comparison)
    plain = other.partition(",")[0]
    return list(dict.fromkeys([LASER, other, plain]))


def written(value: MetricValue) -> str:
    """`0.0904 ± 0.0144`; a dash where there is no row, no interval where there is one."""
    if value.mean != value.mean:
        return "-"
    return f"{value.mean:.4f}" if value.ci95 != value.ci95 else f"{value.mean:.4f} ± {value.ci95:.4f}"


def verdict(difference: MetricValue) -> str:
    """A paired difference in words."""
    amount = f"{difference.mean:+.4f} ± {difference.ci95:.4f}"
    if difference.mean == 0.0 == difference.ci95:
        return "the same"
    if abs(difference.mean) <= difference.ci95 or difference.ci95 != difference.ci95:
        return f"level within the noise ({amount})"
    return f"{'better' if difference.mean > 0 else 'worse'} ({amount})"
