"""Training: the ID recommender, the stages of Laser, checkpoints."""
