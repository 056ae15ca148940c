"""The streaming engine: what is in a checkpoint, and each tensor read once and placed once.

:meth:`Checkpoint.open` reads headers only and imports no torch.
"""

from llmload.checkpoint.description import Checkpoint, CheckpointFile
from llmload.checkpoint.header import TensorInfo

__all__ = ["Checkpoint", "CheckpointFile", "TensorInfo"]
