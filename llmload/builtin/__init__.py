"""The plugins that come with ``llmload``, one file each, registered like anybody else's."""
