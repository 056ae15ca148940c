"""Several models from one spec, and what they can have in common in memory.

In comes a group spec; each member goes the way of one load, and what two members hold alike is held
once. Out goes a :class:`Group` of results by name.
"""
