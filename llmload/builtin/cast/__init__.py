"""Modules by name in another dtype than the model's."""
