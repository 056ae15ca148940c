"""Which rows of a parameter a rank keeps: FSDP2's rule, for the load and its plan.

FSDP2 cuts the first dimension into as many chunks as there are ranks, all of one size but the last
ones, which may be smaller or empty: the same rows as ``torch.chunk``. Rows are one piece of a
parameter laid out flat, so that a rank reads one span of each tensor in the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmload.plugin import Span


def rows_of(shape: Sequence[int], rank: int, ranks: int) -> Span:
    """Return the rows of a rank; ``size`` is what FSDP2 fills them up to."""
    return Span.of(shape[0], rank, ranks)


def span_of(shape: Sequence[int], rank: int, ranks: int) -> Span:
    """Return the elements of these rows in the parameter laid out flat."""
    rows, width = rows_of(shape, rank, ranks), math.prod(shape[1:])
    return Span(rows.start * width, rows.stop * width, rows.size * width)
