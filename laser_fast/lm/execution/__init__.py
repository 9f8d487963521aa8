"""How the layers of the frozen language model run: fused, recomputed, offloaded, compiled, captured."""
