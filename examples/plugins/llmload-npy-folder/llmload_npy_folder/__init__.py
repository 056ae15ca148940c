"""The plugin ``npy_folder`` for :mod:`llmload`. Importing this package imports no torch."""
