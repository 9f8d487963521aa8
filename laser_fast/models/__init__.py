"""The network of Laser: encode, forward, objective, and its assembly from a configuration."""

from laser_fast.models.objective import LaserOutput
from laser_fast.models.zero_shot import TextSimilarity, text_vectors

__all__ = ["LaserOutput", "TextSimilarity", "text_vectors"]
