"""Values that a spec sets in place of a config's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from llmload.errors import CheckpointError, SpecError, in_one_line
from llmload.hf import bounds
from llmload.spec.suggest import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.untrusted import UntrustedFolder

_ELSEWHERE: Final = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "id2label": "labels",
    "label2id": "labels",
    "num_labels": "labels",
    "torch_dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}
"""Key of a config -> the spec's own key for it."""
_FIXED: Final = (
    "architectures",
    "auto_map",
    "model_type",
    "quantization_config",
    "transformers_version",
    "transformers_weights",
)
"""Keys that say what the checkpoint is, or where more of it lies."""
_OLD_ROPE: Final = ("rope_scaling", "rope_theta")
"""Of transformers before 5."""


def override(
    config: PretrainedConfig,
    files: UntrustedFolder,
    content: dict[str, Any],
    values: Mapping[str, Any],
    checkpoint: Checkpoint | None,
) -> PretrainedConfig:
    """Return the config that the folder would give if its file had ``values``.

    :param config: as the folder gives it.
    :param content: of ``config.json``; a mapping in ``values`` for a part of the config, such as
        ``text_config``, changes single keys of it.
    :raises SpecError: a key is none of this config's, or not one to be set; transformers refuses a
        value, or the checkpoint cannot hold such a model.
    """
    merged = _merged(config, content, values, "config")
    try:
        bounds.hold_counts(files, merged, checkpoint)
    except CheckpointError as error:
        message = error.problems[0].message
        raise SpecError(message, fix="Set a smaller number.", where="config") from None
    asked = config._attn_implementation_internal
    options = {} if asked is None else {"attn_implementation": asked}
    try:
        made: PretrainedConfig = type(config).from_dict(merged, **options)
    except Exception as error:  # transformers raises many kinds for a bad value
        raise SpecError(
            f"transformers refuses the config with these values: {in_one_line(error).rstrip('.')}",
            fix="See the documentation of the model type's config.",
            where="config",
        ) from error
    made.name_or_path = config.name_or_path
    if hasattr(config, "_commit_hash"):  # of what comes from the hub
        made._commit_hash = config._commit_hash
    return made


def _merged(
    config: PretrainedConfig, content: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    known = {*content, *config.to_dict(), *config.attribute_map}
    if "rope_parameters" in known and "rope_parameters" not in content:
        known |= {*_OLD_ROPE}  # which transformers 5 puts together where the file has them apart
    merged = dict(content)
    for key, value in values.items():
        _hold(key, known, config, f"{where}.{key}")
        part: Any = getattr(config, key, None)
        if isinstance(value, Mapping) and hasattr(part, "attribute_map"):
            inner = content.get(key)
            inner = inner if isinstance(inner, Mapping) else part.to_dict()
            value = _merged(part, inner, value, f"{where}.{key}")
        # What a file may call by either name is written once.
        for alias, name in config.attribute_map.items():
            if key in (alias, name):
                merged.pop(alias, None)
                merged.pop(name, None)
        merged[key] = value
    return merged


def _hold(key: str, known: set[str], config: PretrainedConfig, where: str) -> None:
    if key in _ELSEWHERE:
        fix = f"Set `{_ELSEWHERE[key]}`, beside `config`."
        raise SpecError(f"{key!r} has a key of its own", fix=fix, where=where)
    if key in _FIXED or key.startswith("_"):
        raise SpecError(
            f"{key!r} says what the checkpoint is, and is not to be set",
            fix="Remove it; where the folder's config is wrong, mend that.",
            where=where,
        )
    if key in _OLD_ROPE and key not in known and "rope_parameters" in known:
        raise SpecError(
            f"the config has {key!r} in its `rope_parameters`",
            fix="Set `rope_parameters`, whole: `{rope_type: linear, factor: 2.0,"
            " rope_theta: 1e4}`.",
            where=where,
        )
    if key not in known or callable(getattr(type(config), key, None)):
        words = sorted(word for word in known if not word.startswith("_"))
        raise SpecError(
            f"a config of model type {config.model_type!r} has no key {key!r}",
            fix=nearest(key, words) or f"Known are: {', '.join(words)}.",
            where=where,
        )
