"""Recommenders that work on item ids alone: the protocol, SASRec, GRU4Rec, rules, neighbours, popularity."""

from laser_fast.recommenders.baselines import Markov1, Popularity
from laser_fast.recommenders.gru4rec import GRU4Rec
from laser_fast.recommenders.item_to_item import ItemKNN, SequentialRules
from laser_fast.recommenders.protocol import Scorer, SequentialRecommender
from laser_fast.recommenders.sasrec import SASRec

__all__ = [
    "GRU4Rec",
    "ItemKNN",
    "Markov1",
    "Popularity",
    "SASRec",
    "Scorer",
    "SequentialRecommender",
    "SequentialRules",
]
