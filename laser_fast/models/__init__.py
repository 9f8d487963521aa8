"""Models: the recommenders that work on item ids alone, and the systems built on a frozen language model."""

from laser_fast.models.baselines import Markov1, Popularity
from laser_fast.models.calibration import CalibratedScorer, Calibration
from laser_fast.models.gru4rec import GRU4Rec
from laser_fast.models.item_to_item import ItemKNN, SequentialRules
from laser_fast.models.laser import LaserModel, LaserOutput, Recommendation
from laser_fast.models.recommender import Scorer, SequentialRecommender
from laser_fast.models.sasrec import SASRec
from laser_fast.models.zero_shot import TextSimilarity, text_vectors

__all__ = [
    "CalibratedScorer",
    "Calibration",
    "GRU4Rec",
    "ItemKNN",
    "LaserModel",
    "LaserOutput",
    "Markov1",
    "Popularity",
    "Recommendation",
    "SASRec",
    "Scorer",
    "SequentialRecommender",
    "SequentialRules",
    "TextSimilarity",
    "text_vectors",
]
