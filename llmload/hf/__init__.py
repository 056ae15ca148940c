"""All that knows transformers and its versions.

In come a spec's model and a checkpoint; out go the folder, the config, the class, the model without
storage, and that model filled. What one version of transformers does otherwise than another stands
here and nowhere else.
"""
