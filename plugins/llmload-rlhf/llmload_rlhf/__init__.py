"""Reward, critic and value heads for :mod:`llmload`, each in the layout of its system.

Three sections of a spec, found by their entry points: ``reward_head``, ``critic_head`` and
``value_head``. Importing this package imports no torch.
"""
