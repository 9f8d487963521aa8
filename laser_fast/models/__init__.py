"""Models: the recommenders that work on item ids alone, and the systems built on a frozen language model."""

from laser_fast.models.baselines import ItemKNN, Markov1, Popularity
from laser_fast.models.calibration import CalibratedScorer, Calibration
from laser_fast.models.recommender import Scorer, SequentialRecommender
from laser_fast.models.sasrec import SASRec

__all__ = [
    "CalibratedScorer",
    "Calibration",
    "ItemKNN",
    "Markov1",
    "Popularity",
    "SASRec",
    "Scorer",
    "SequentialRecommender",
]
