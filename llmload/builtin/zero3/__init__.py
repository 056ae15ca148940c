"""DeepSpeed ZeRO-3: each rank reads and keeps its own part."""
