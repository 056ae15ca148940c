"""The plugins that come with ``llmload``: one folder each, registered like anybody else's.

``plugin.py`` has the hooks, ``section.py`` the spec key, the other files what they need. They use
what :mod:`llmload.plugin` offers to every plugin, and nothing else of ours.
"""
