"""A language model from the Hub, from a folder, or with random weights of a given shape."""
