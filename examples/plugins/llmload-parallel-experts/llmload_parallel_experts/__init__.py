"""The plugin ``parallel_experts`` for :mod:`llmload`. Importing this package imports no torch."""
