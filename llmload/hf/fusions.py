"""What transformers would say of the fusions of modules that a config asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmload.errors import Problem, in_one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEY = "fusion_config"


def problems(config: PretrainedConfig) -> Iterator[Problem]:
    """Yield why ``from_pretrained`` would refuse the config's fusions; versions that know none of
    them leave the key alone."""
    asked = getattr(config, _KEY, None)
    if not asked:
        return
    why = "it is no mapping of names" if not isinstance(asked, Mapping) else _refused(asked)
    if why:
        yield Problem(
            where="model",
            message=f"the config's `{_KEY}` asks for fusions that transformers refuses: {why}",
            fix=f"Remove `{_KEY}` from config.json: it changes how a model computes, not what.",
        )


def _refused(asked: Mapping[str, object]) -> str:
    try:
        from transformers.fusion_mapping import _iter_enabled_fusions
    except ImportError:
        return ""
    try:
        _iter_enabled_fusions(asked)
    except Exception as error:
        return in_one_line(error).rstrip(".")
    return ""
