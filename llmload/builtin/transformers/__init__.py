"""The loader that calls ``from_pretrained``."""
