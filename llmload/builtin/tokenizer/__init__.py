"""The tokenizer: pad token, sides, added tokens, chat template."""
