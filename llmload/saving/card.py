"""A model card to go on from: what the folder is made of, and what its author has to say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmload.spec import yaml_write
from llmload.spec.words import AUTO_CLASSES

if TYPE_CHECKING:
    from llmload.loading.pipeline import LoadResult
    from llmload.loading.report import Report

FILE: Final = "README.md"
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def text(result: LoadResult, *, adapter: bool, rows: int | None) -> str:
    """Return the card of a model or adapter.

    :param rows: of the embeddings that belong to an adapter, where its base has others.
    """
    return "\n".join(_lines(result, adapter=adapter, rows=rows)) + "\n"


def _lines(result: LoadResult, *, adapter: bool, rows: int | None) -> Iterator[str]:
    report = result.report
    yield from ("---", yaml_write.dump(_metadata(report, adapter=adapter)).rstrip(), "---", "")
    yield from ("# A model card to be written", "")
    kind = "a PEFT adapter" if adapter else "a model"
    yield f"This folder holds {kind}, saved by llmload. Say here what it is for, what it was"
    yield "trained on, how well it does, and under which licence it may be used."
    yield from ("", "## Base model", "")
    commit = f" at commit `{report.commit}`" if report.commit else ""
    yield f"`{report.model}`{commit}"
    yield from ("", "## Load", "", "```python")
    yield from _loading(result, rows) if adapter else _loading_model(result)
    yield from ("```", "", "## Spec", "", "It was made by:", "", "```yaml")
    yield yaml_write.dump(report.spec).rstrip()
    yield from ("```", "", "## Plugins", "", "| plugin | from |", "|---|---|")
    yield from _rows(report.plugins)
    yield from ("", "## Versions", "", "| package | version |", "|---|---|")
    yield from _rows(report.versions)


def _loading_model(result: LoadResult) -> Iterator[str]:
    name = _class(result)
    yield f"from transformers import {name}"
    yield ""
    yield f'model = {name}.from_pretrained(folder, dtype="auto")'


def _loading(result: LoadResult, rows: int | None) -> Iterator[str]:
    name, revision = _class(result), result.report.spec.get("revision")
    at = f", revision={revision!r}" if revision else ""
    yield "from peft import PeftModel"
    yield f"from transformers import {name}"
    yield ""
    yield f'base = {name}.from_pretrained({result.report.model!r}{at}, dtype="auto")'
    if rows is not None:
        yield f"base.resize_token_embeddings({rows})"
    yield "model = PeftModel.from_pretrained(base, folder)"


def _class(result: LoadResult) -> str:
    """Return what loads the model: transformers' ``Auto`` class, or the class itself."""
    word = str(result.report.spec.get("auto_class", "causal_lm"))
    found = AUTO_CLASSES.get(word)
    return found.transformers if found is not None else result.plan.model_class


def _rows(cells: Mapping[str, str]) -> Iterator[str]:
    return (f"| {name} | {value} |" for name, value in cells.items())


def _metadata(report: Report, *, adapter: bool) -> dict[str, object]:
    """Return what the hub reads of a card; it wants ids, so no folder is named."""
    found: dict[str, object] = {"library_name": "peft" if adapter else "transformers"}
    if _HUB_ID.fullmatch(report.model) and not Path(report.model).exists():
        found["base_model"] = report.model
    return found | {"tags": ["llmload", "lora"] if adapter else ["llmload"]}
