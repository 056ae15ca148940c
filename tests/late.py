"""Loads whose plan had no error and that are refused all the same: what a plan should have said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from llmload.errors import LlmloadError, PluginError, RequestError
from llmload.group import loading
from llmload.loading import pipeline


@contextmanager
def watched() -> Iterator[list[LlmloadError]]:
    """Collect them, in this process. What a plugin does against the contract shows when it does."""
    late: list[LlmloadError] = []
    execute = pipeline.execute

    def watching(*args: Any, **options: Any) -> pipeline.LoadResult:
        try:
            return execute(*args, **options)
        except RequestError as error:
            if not isinstance(error, PluginError):
                late.append(error)
            raise

    here, in_groups = (mock.patch.object(m, "execute", watching) for m in (pipeline, loading))
    with here, in_groups:
        yield late


def held(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function on a rank, and fail where there are some."""
    with watched() as late:
        result = function(*args, **options)
    assert not late, f"the plan had no error, and the load was refused: {late[0]}"
    return result
