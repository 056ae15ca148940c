"""What ``map_keys`` and ``check`` found out, while the plan was made: kept for the load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from llmload.checkpoint import Checkpoint, TensorInfo


@dataclass(slots=True, kw_only=True)
class Found:
    """Facts that plugins state for others. Any plugin can state one, and any can read it.

    A plugin reads what those before it in plan order have stated.
    """

    checkpoint: Checkpoint | None
    """Names, shapes, dtypes and places of the loader's tensors, with keys mapped; None with
    ``weights: random``. While ``map_keys`` is called, all tensors as they are stored. Written by
    the host after ``map_keys``; read by everybody."""
    claimed: dict[str, TensorInfo] = field(default_factory=dict)
    """Tensors that a plugin took for itself in ``map_keys``, by their key there. Written by the
    host; read by the plugin that claimed them."""
    declined: dict[str, str] = field(default_factory=dict)
    """Loader -> why its ``check``, or another plugin's for it, says that it will not load. Written
    by the host; read by plugins that need a certain loader, and by groups."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Written by the plugin that loads the tokenizer; read by everybody, and given to the user."""
    processor: ProcessorMixin | None = None
    """What makes inputs of texts, images and the like; its tokenizer is ``tokenizer``. Written
    beside it, for models of more than text; read by everybody, and given to the user."""
    new_tokens: dict[str, int] = field(default_factory=dict)
    """Token -> id of those that the checkpoint's own tokenizer lacks: their embedding rows are
    untrained, even where the checkpoint has rows to spare. Written beside ``tokenizer``; read by
    the plugin that resizes embeddings."""
    placed_by: str | None = None
    """The plugin that will set ``placement``. Written by that plugin, which a later one may
    replace; read by groups, which then do not decide how this model's weights are stored, and by
    plugins that would place weights too."""
    splits: bool = False
    """Whether the placement is a ``Splitting``: another plugin may then change how each weight is
    stored before it is split. Written beside ``placed_by``; read by such a plugin."""
    one_dtype: bool = False
    """Whether the placement gives every parameter of floating point the model's dtype, modules that
    transformers would leave in float32 included. Written beside ``placed_by``; read by the host,
    which foretells bytes."""
    reads: str = ""
    """What of the checkpoint this process will read, in words; empty for all of it. Written by the
    plugin that splits the weights; read by the loader, for the plan."""
    adapter_from: Path | None = None
    """The folder of the saved adapter that is resumed or merged. Written by the plugin that does
    it; read by the host, which asks what becomes of an adapter beside the weights."""
    cast_later_by: str = ""
    """Who casts every parameter of floating point to ``dtype`` when training begins, codes of
    quantised weights too. Written by the plugin that prepares for it; read by those that choose
    dtypes."""
    to_initialise: dict[str, str] = field(default_factory=dict)
    """Parameter of the base model that needs no value in the checkpoint -> why. Written by the
    plugin that answers for its value; read by loaders and the host, for ``strict``."""
    apart: set[str] = field(default_factory=set)
    """Parameters that the config ties and the checkpoint holds with other values, so that they stay
    apart, among others that are tied. Written and read by the host."""
    handed_on: dict[str, Any] = field(default_factory=dict)
    """What a plugin's ``check`` leaves for its own later hooks, by plugin name."""
