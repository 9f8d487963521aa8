"""Attacks on what the library promises: each file is one, and says what it tries and what counts as lost."""
