"""The streaming engine: what is in a checkpoint, and each tensor read once and placed once."""
