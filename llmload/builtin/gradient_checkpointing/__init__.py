"""Gradient checkpointing, with input gradients where an adapter needs them."""
