"""What one would otherwise write: the loop form of each operation, and its strongest plain PyTorch form."""
