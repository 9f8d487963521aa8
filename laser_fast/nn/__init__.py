"""What is trained around the language model: M-Former, Bi-Tuning, prefixes, the text residual, the heads of stage 1.

Import from the files themselves: re-exported here, they would load transformers for a plain SASRec.
"""
