"""Checkpoint keys brought under the names that a model has: by rule, by regular expression.

Only names are handled here. Whoever renames gets every key with its new name, or an error that
names the keys: nothing is dropped and no two keys become one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from llmload import patterns
from llmload.errors import CheckpointError, Problem

RULES: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        # DeepSpeed-Chat misspelt the attribute of its reward model until October 2023.
        "deepspeed_chat": ((r"^rwtranrsformer\.", "rwtransformer."),),
        "ddp": ((r"^module\.", ""),),
        "compiled": ((r"(^|\.)_orig_mod\.", r"\1"),),
        "peft": (
            (r"^base_model\.model\.", ""),
            (r"\.base_layer\.", "."),
            (r"\.modules_to_save\.default\.", "."),
            (r"(\.lora_\w+)\.default(?=\.|$)", r"\1"),
        ),
    }
)
"""Rule -> the regular expressions and replacements by which it is undone, in order."""

COATI = "coati"
"""The one rule that needs the model: see :func:`undo_coati`."""

_SHOWN = 3


class Renaming:
    """The keys of a checkpoint on their way to the model's names.

    :param keys: as they are stored.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.names: dict[str, str] = {key: key for key in keys}
        """Key as stored -> name it has by now."""
        self.counts: dict[str, int] = {}
        """Rule or regular expression -> how many keys it changed or, if it replaces a match by
        itself, matched."""

    def by_regex(self, pattern: str, replacement: str) -> None:
        """Replace every match, as ``re.sub`` does.

        :raises CheckpointError: nothing matches.
        :raises RequestError: matching takes too long.
        """
        hits = sum(patterns.search(pattern, name) is not None for name in self.names.values())
        if not hits:
            found = list(self.names.values())
            raise CheckpointError(
                Problem(
                    where=f"key_map[{pattern!r}]",
                    message=f"the regular expression matches none of the {len(found)} keys of the"
                    f" checkpoint, which are {_some(found)}",
                    fix="Correct the rule, or remove it. Rules are applied one after the other,"
                    " each to what the one before it left.",
                )
            )
        self.counts[pattern] = hits
        self._change(
            {name: patterns.sub(pattern, replacement, name) for name in self.names.values()}
        )

    def by_rule(self, rule: str, of_model: Collection[str]) -> None:
        """Undo what a system did to its keys, where it did.

        :param rule: one of :data:`RULES`, or :data:`COATI`.
        :param of_model: the names of the model's parameters and buffers.
        :raises CheckpointError: as :func:`undo_coati`.
        """
        before = list(self.names.values())
        if rule == COATI:
            after = undo_coati(before, of_model)
        else:
            after = {name: name for name in before}
            for pattern, replacement in RULES[rule]:
                after = {key: re.sub(pattern, replacement, name) for key, name in after.items()}
        self.counts[rule] = sum(after[name] != name for name in before)
        self._change(after)

    def _change(self, names: Mapping[str, str]) -> None:
        self.names = {key: names[name] for key, name in self.names.items()}

    def refuse_collisions(self) -> None:
        """Raise ``CheckpointError`` where two keys have come to the same name."""
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key, name in self.names.items():
            keys_of[name].append(key)
        problems = [
            Problem(
                where="key_map",
                message=f"the keys {_some(keys)} of the checkpoint would all be called {name!r}",
                fix="Make the rules map each key to a name of its own.",
            )
            for name, keys in keys_of.items()
            if len(keys) > 1
        ]
        if problems:
            raise CheckpointError(problems)


def undo_coati(keys: Iterable[str], of_model: Collection[str]) -> dict[str, str]:
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
