"""The plugins: which there are, which are sound, which take part, in which order they are called.

In come plugin objects and the installed distributions; out goes a :class:`Registry`, which picks
the :class:`Host` of one load. Nothing here loads a model.
"""
