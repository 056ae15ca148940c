"""The plugin ``signed_only`` for :mod:`llmload`. Importing this package imports no torch."""
