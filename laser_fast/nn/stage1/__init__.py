"""Stage 1: the heads, the text branch and the pre-trained weights that align M-Former with text."""
