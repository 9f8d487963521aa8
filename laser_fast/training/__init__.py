"""Training: Laser in its stages, and the ID-based recommender it reads."""
