"""The page of a load, and the same as JSON beside it: of all ranks, written by the first."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.errors import RequestError
from llmload.saving.writing import refused, require_place

if TYPE_CHECKING:
    from llmload.loading.pipeline import LoadResult
    from llmload.loading.report import Report


def require(page: Path | None) -> None:
    """Refuse a page that could not be written, before a minute is spent on the load.

    :raises RequestError: its name does not end in ``.html``, or there is no place for it.
    """
    if page is None:
        return
    if page.suffix != ".html":
        raise RequestError(
            f"the report {str(page)!r} would be a page, and is not called so",
            fix=f"Call it {page.stem + '.html'!r}; JSON is written beside it.",
            where="--report",
        )
    require_place(page)
    require_place(page.with_suffix(".json"))


def write(page: Path | None, results: Mapping[str, LoadResult]) -> None:
    """Write the page of one load, or of the members of a group by their names.

    Every rank comes here, and the first one writes for all.
    """
    if page is None:
        return
    gathered = {name: _of_all_ranks(result.report) for name, result in results.items()}
    if any(reports is None for reports in gathered.values()):
        return
    from llmload.loading import page as pages

    parts, data = {}, {}
    for name, reports in gathered.items():
        assert reports is not None
        plan = results[name].plan
        parts[name] = pages.of_load(plan, reports)
        data[name] = {
            "plan": plan.model_dump(mode="json"),
            "ranks": [report.model_dump(mode="json") for report in reports],
        }
    first = next(iter(results.values())).report
    with refused(page):
        page.write_text(pages.whole(f"{first.model}, loaded", parts), encoding="utf-8")
        content = data.get("", {"members": data})
        text = json.dumps(content, indent=2, ensure_ascii=False)
        page.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _of_all_ranks(report: Report) -> list[Report] | None:
    """Return every rank's report on the first rank, None on the others."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return [report]
    if not torch.distributed.is_initialized():
        return [report]
    first = torch.distributed.get_rank() == 0
    found: list[Report | None] | None = None
    if first:
        found = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(report, found)
    return None if found is None else [each for each in found if each is not None]
