"""Embeddings resized to the tokenizer."""
