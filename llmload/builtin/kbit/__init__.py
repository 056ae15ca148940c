"""4-bit and 8-bit bitsandbytes layers, quantised while streaming, and their preparation."""
