"""LoRA through PEFT: all of ``LoraConfig``, dispatchers by name, strict resuming."""
