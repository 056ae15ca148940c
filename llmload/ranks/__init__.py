"""The processes of one load that a launcher started: they agree, go on together, or all stop.

In comes what a rank is about to load; out goes a :class:`~llmload.ranks.meeting.Ranks`, at whose
meeting points every rank either comes or learns which one failed and why. For plugins that split a
model over ranks, whatever library splits it. Modules of this room import torch: they are imported
by functions.
"""
