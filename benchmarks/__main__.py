"""Run comparisons and write their results: ``python -m benchmarks --help``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from . import results, show
from .case import TOPICS, Case, cases
from .compare import compare
from .folders import SIZES


def main(
    topics: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(TOPICS)}; by default every one."),
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeatable.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SIZES)}; by default the case's own.")
    ] = None,
    stack: Annotated[list[str] | None, typer.Option(help="Only on this stack.")] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: the interpreter of another stack, with llmload installed."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Alternating runs of each side.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of a run, all its ranks together.")] = 2,
    remark: Annotated[str, typer.Option(help="What else the machine did, for the page.")] = "",
    work: Annotated[Path, typer.Option(help="Where checkpoint folders are kept.")] = Path("build"),
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("benchmarks/results"),
) -> None:
    """Compare llmload with its peers, alternating, each run in processes of its own.

    A partial run replaces the rows that it measures and keeps the others.
    """
    interpreters = {"modern": sys.executable} | dict(each.split("=", 1) for each in python or ())
    for asked, options in (
        (topics, TOPICS),
        (size, SIZES),
        (stack, interpreters),
        (case, [name for topic in topics or TOPICS for name in cases(topic)]),
    ):
        if unknown := [name for name in asked or () if name not in options]:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(options)}")
    for topic, name, comparison in _chosen(topics or TOPICS, case):
        for where in comparison.stacks:
            if stack and where not in stack:
                continue
            if where not in interpreters:
                print(f"{name}: not run on {where}: no --python {where}=PATH", file=sys.stderr)
                continue
            for each in size or comparison.sizes:
                row = compare(
                    topic,
                    name,
                    comparison,
                    each,
                    where,
                    interpreters[where],
                    pairs=pairs,
                    threads=threads,
                    work=work,
                )
                results.add(
                    out, topic, row, results.conditions(interpreters[where], threads, remark)
                )
                print(show.line(row), file=sys.stderr)


def _chosen(
    topics: list[str] | tuple[str, ...], only: list[str] | None
) -> Iterator[tuple[str, str, Case]]:
    for topic in topics:
        for name, comparison in cases(topic).items():
            if not only or name in only:
                yield topic, name, comparison


if __name__ == "__main__":
    typer.run(main)
