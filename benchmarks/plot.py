"""Results as a picture: time and memory of every side, on scales on which all sizes are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .case import OURS

_OURS_COLOUR = "#2b6cb0"
_COLOURS = ("#a0aec0", "#dd6b20", "#38a169", "#805ad5")
_PANELS = (("seconds", "seconds"), ("peak_rss_mib", "peak RSS, MiB"))


def draw(results: dict[str, Any], stem: Path) -> None:
    """Draw every phase of every row, median and range, into ``stem.png`` and ``stem.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = stem.name  # the same file for the same results
    from matplotlib import pyplot

    rows = results["rows"]
    lines = _lines(rows)
    names = dict.fromkeys(name for row in rows for name in row["sides"])
    others = [name for name in names if name != OURS]
    colours = {OURS: _OURS_COLOUR} | {
        name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(others)
    }
    size = (13, 1.6 + 0.42 * len(lines))
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=size, sharey=True)
    for axis, (key, title) in zip(axes, _PANELS, strict=True):
        for number, (name, colour) in enumerate(colours.items()):
            offset = 0.36 * (number / max(1, len(colours) - 1) - 0.5)
            found = [
                (place + offset, phases[name][key])
                for place, (_, phases) in enumerate(lines)
                if name in phases
            ]
            _points(axis, found, colour, name)
        _scale(axis, [phase[key] for _, phases in lines for phase in phases.values()])
        axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles, named = axes[0].get_legend_handles_labels()
    figure.legend(handles, named, loc="lower center", ncols=len(named), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(f"{stem}.png", dpi=120)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    pyplot.close(figure)


def _lines(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return a label and every side's figures for each phase of each row."""
    several = len({row["stack"] for row in rows}) > 1
    lines = []
    for row in rows:
        label = f"{row['title']}, {row['size']}" + (f" ({row['stack']})" if several else "")
        sides = {name: side["phases"] for name, side in row["sides"].items()}
        count = max(map(len, sides.values()))
        for number in range(count):
            phases = {name: each[number] for name, each in sides.items() if number < len(each)}
            phase = next(iter(phases.values()))["name"]
            lines.append((label + (f": {phase}" if count > 1 else ""), phases))
    return lines


def _points(axis: Any, found: list[tuple[float, dict[str, float]]], colour: str, name: str) -> None:
    """Draw medians, and lines from the lowest to the highest run."""
    axis.errorbar(
        [summary["median"] for _, summary in found],
        [place for place, _ in found],
        xerr=[
            [summary["median"] - summary["low"] for _, summary in found],
            [summary["high"] - summary["median"] for _, summary in found],
        ],
        fmt="o",
        markersize=6,
        color=colour,
        label=name,
    )


def _scale(axis: Any, summaries: list[dict[str, float]]) -> None:
    """Make the axis logarithmic, its ticks plain numbers as close as they can be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [summary[end] for summary in summaries for end in ("low", "high")]
    narrow = max(values) < 100 * max(min(values), 1e-9)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="#e2e8f0")
    axis.set_axisbelow(True)
