"""Recommenders trained elsewhere: RecBole and LLaRA."""
