"""Which interactions train, validate and test."""
