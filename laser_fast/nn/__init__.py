"""Modules on packed sequences: attention, Q-Former, M-Former, Bi-Tuning, the frozen language model, pre-training.

Import from the files themselves: re-exported here, the frozen language model would load transformers for a plain
    SASRec.
"""
