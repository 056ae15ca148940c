"""``python -m llmload``."""

from llmload.cli import main

main()
