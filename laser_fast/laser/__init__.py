"""LaserModel: the network with its catalogue, its answers, and its files."""

from laser_fast.laser.model import LaserModel

__all__ = ["LaserModel"]
