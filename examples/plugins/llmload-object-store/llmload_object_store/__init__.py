"""The plugin ``object_store`` for :mod:`llmload`. Importing this package imports no torch."""
