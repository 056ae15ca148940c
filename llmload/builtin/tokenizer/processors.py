"""What makes inputs of more than text: the processor that a multimodal model's folder describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmload.plugin import Problem, cache_dir, in_one_line

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from llmload.builtin.tokenizer.section import TokenizerSection
    from llmload.plugin import LoadContext

_CONFIGS: Final = ("processor_config.json", "preprocessor_config.json")
_OF_TEXT: Final = ("causal_lm", "seq2seq_lm", "sequence_classification", "token_classification")
"""Classes whose models take token ids alone, whatever else their folder is good for."""


def load(
    ctx: LoadContext, section: TokenizerSection, folder: Path
) -> tuple[ProcessorMixin | None, Problem | None]:
    """Load the processor of a model of more than text, around the tokenizer that is there already.

    :param folder: of the tokenizer; where it has no processor, the model's own does.
    :returns: the processor, or None for a folder without one; and why it cannot be loaded.
    """
    from transformers import AutoProcessor, ProcessorMixin

    found = [place for place in (folder, ctx.folder) if any((place / n).exists() for n in _CONFIGS)]
    if ctx.spec.auto_class in _OF_TEXT or not found:
        return None, None
    try:
        processor: Any = AutoProcessor.from_pretrained(
            found[0],
            use_fast=section.use_fast,
            trust_remote_code=ctx.spec.trust_remote_code,
            local_files_only=True,
            cache_dir=cache_dir(ctx.spec),
        )
    except Exception as error:  # transformers raises many kinds for a bad file or a missing package
        return None, Problem(
            where="tokenizer",
            severity="warning",
            message=f"the processor in {str(found[0])!r} cannot be loaded, and the model comes with"
            f" its tokenizer alone: {in_one_line(error).rstrip('.')}",
            fix="Install the package that it needs, or save the processor again.",
        )
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "tokenizer"):
        return None, None  # of images alone, which no tokenizer belongs to
    processor.tokenizer = ctx.tokenizer
    return processor, None
