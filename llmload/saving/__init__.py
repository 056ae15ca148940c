"""What is written to disk: whole models and adapters, and files, all of them or none.

In comes a :class:`~llmload.loading.pipeline.LoadResult`, or a spec that is refused before a weight
is read where it tells that its model cannot be saved (``obstacles``). Out goes a folder (``save``)
that is held to the model (``proof``) before it gets its name (``writing``).
"""
