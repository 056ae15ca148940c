"""The key rule ``coati``: names of the model, from the keys that old ColossalChat wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from llmload.plugin import CheckpointError, Problem


def undo(keys: Iterable[str], of_model: Collection[str]) -> dict[str, str]:
    """Give back the ``model.`` that old coati cut out of each key, wherever it stood.

    ``DDPStrategy.save_pretrained`` of ColossalAI v0.3.4 (applications/Chat) did
    ``key.replace("model.", "", 1)`` to the keys of an ``Actor``, ``Critic`` or ``RewardModel``,
    whose transformer is the attribute ``model``. Which ``model.`` went cannot be told from a key
    alone, so each of the model's own names is shortened in the same way, and the key is held
    against those and against the names as they are (an ``Actor``'s keys lost the wrapper's
    ``model.`` and are right).

    :returns: key -> name in the model; a key that fits no name stays as it is.
    :raises CheckpointError: a key fits two names.
    """
    origins: dict[str, set[str]] = defaultdict(set)
    for name in of_model:
        origins[name].add(name)
        origins[name.replace("model.", "", 1)].add(name)
    found: dict[str, str] = {}
    problems = []
    for key in keys:
        candidates = sorted(origins.get(key, {key}))
        found[key] = candidates[0]
        if len(candidates) > 1:
            problems.append(
                Problem(
                    where="key_rules",
                    message=f"old coati may have made the key {key!r} from"
                    f" {' or '.join(map(repr, candidates))}",
                    fix="Say which in `key_map`, instead of the rule `coati`.",
                )
            )
    if problems:
        raise CheckpointError(problems)
    return found
