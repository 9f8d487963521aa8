"""Attention on packed sequences, and its backends."""
