"""Models sharded by PyTorch: FSDP2, tensor and expert parallel, in the section ``parallel``."""
