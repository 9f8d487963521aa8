"""The frozen language model: loading, packed attention, prefix keys and values, and how its layers run."""
