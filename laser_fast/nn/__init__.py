"""What is trained around the language model. Import from its files: a plain SASRec must not load transformers."""
