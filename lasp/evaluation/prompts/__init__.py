"""Texts with questions about them, of a given number of tokens, for any tokenizer."""
