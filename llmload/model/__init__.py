"""What can be seen of a torch model, whoever made it.

In comes a module; out goes what it is made of: the whole and the parts of partitioned parameters,
every random operation of a forward pass, every parameter that a gradient reaches. Modules of this
room import torch: they are imported by functions.
"""
