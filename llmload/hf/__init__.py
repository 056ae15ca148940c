"""All that knows transformers and its versions.

In come a spec's model and a checkpoint; out go the folder, the config, the class, the model without
storage, and that model filled. What one line of versions does otherwise than another is one
interface, :class:`~llmload.hf.interface.Transformers`, with a package for each line: ``v5`` and
``v4_51``. Which versions are supported stands in ``versions``.
"""

from llmload.hf.interface import Transformers
from llmload.hf.versions import installed_transformers

__all__ = ["Transformers", "installed_transformers"]
