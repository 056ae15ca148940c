"""What every hook of one load sees: the request, what was found, and what this run records.

In come a checked spec and what was found of the model; the context goes through every hook. It
belongs to one load and to nothing else.
"""
