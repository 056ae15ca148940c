"""The files of a checkpoint: folders, headers, mapping, reading and placing each tensor once.

In comes a folder or file; out goes a :class:`Checkpoint`, which knows name, dtype, shape and place
of every tensor before a weight is read, and then the tensors themselves, on the files' own pages
where they can stay there. Knows torch, and no model library. :meth:`Checkpoint.open` reads headers
only and imports no torch.
"""

from llmload.checkpoint.contents import Checkpoint, CheckpointFile
from llmload.checkpoint.header import TensorInfo

__all__ = ["Checkpoint", "CheckpointFile", "TensorInfo"]
