"""What an adapter takes beside its own weights: those of the base that it makes others of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmload.builtin.lora.section import LoraSection
from llmload.plugin import Cost

if TYPE_CHECKING:
    from llmload.plugin import Forecast, LoadContext

_PREFIX = "base_model.model."


def costs(ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
    """Take what is written to off the files' pages; yield the adapter's part of one weight.

    What is merged is computed for one layer after the other, in the dtype of its base.
    """
    section, facts = ctx.section(LoraSection), ctx.facts.get("lora")
    if facts is None:  # another plugin's adapter came first
        return
    merged = list(facts.get("merged_first", {}).values())
    merged += [facts["targets"]] if section.merge else []
    written = {f"{name}.weight" for names in merged for name in names}
    written |= {_in_base(name) for name in facts["changed_base"]}
    largest = 0
    for weight in forecast.weights.values():
        if _in_base(weight.name) in written:
            weight.on_pages = False
            weight.route = "merged" if section.merge else "changed"
            weight.why = "the adapter is merged into it" if section.merge else "for its adapter"
            largest = max(largest, weight.elements * weight.itemsize)
    yield Cost(what="an adapter's part of one weight", nbytes=largest, phase="finish")


def _in_base(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")
