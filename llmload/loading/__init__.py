"""The way of one load, from a spec to a model that is proven to be what the plan said.

``pipeline`` is the page to read: it prepares the plan (``planning``, with ``rehearsal`` on the meta
device), enters the plugins' contexts, asks the loaders, lets plugins finish the model
(``hook_calls``) and proves the result (``audit``). Out goes a :class:`LoadResult` with its plan and
report.
"""
