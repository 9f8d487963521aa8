"""From embeddings to answers: the calibrated score, exact top-k, requests, kept prefixes."""

from laser_fast.retrieval.calibration import CalibratedScorer, Calibration
from laser_fast.retrieval.requests import Recommendation

__all__ = ["CalibratedScorer", "Calibration", "Recommendation"]
