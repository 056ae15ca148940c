"""ColossalChat's own LoRA layers, its faults put right."""
