"""Reward, critic and value heads for :mod:`llmload`, each in the layout of its system.

Four sections of a spec, found by their entry points: ``reward_head``, ``critic_head`` and
``value_head``, and ``coati_policy`` for policies of old coati. Importing this package
imports no torch.
"""
