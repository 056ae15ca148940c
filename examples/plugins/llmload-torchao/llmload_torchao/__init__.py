"""Weights in 8 bits by torchao, for :mod:`llmload`. Importing this package imports no torch."""
