"""Training of the ID-based recommender."""
