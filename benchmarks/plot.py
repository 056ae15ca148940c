"""Results as a picture: time and memory of every side, on scales on which all sizes are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .case import OURS

_COLOURS = ("#a0aec0", "#dd6b20", "#38a169", "#805ad5")


def draw(results: dict[str, Any], stem: Path) -> None:
    """Draw the first phase of every row, median and range, into ``stem.png`` and ``stem.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = stem.name  # the same file for the same results
    from matplotlib import pyplot

    rows = results["rows"]
    several = len({row["stack"] for row in rows}) > 1
    labels = [
        f"{row['title']}, {row['size']}" + (f" ({row['stack']})" if several else "") for row in rows
    ]
    names = dict.fromkeys(name for row in rows for name in row["sides"])
    others = [name for name in names if name != OURS]
    colours = {OURS: "#2b6cb0"} | {
        name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(others)
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.6 + 0.42 * len(rows)), sharey=True)
    for axis, key, title in (
        (axes[0], "seconds", "seconds"),
        (axes[1], "peak_rss_mib", "peak RSS, MiB"),
    ):
        for number, name in enumerate(colours):
            offset = 0.36 * (number / max(1, len(colours) - 1) - 0.5)
            found = [
                (place + offset, row["sides"][name]["phases"][0][key])
                for place, row in enumerate(rows)
                if name in row["sides"]
            ]
            middles = [summary["median"] for _, summary in found]
            spread = [
                [summary["median"] - summary["low"] for _, summary in found],
                [summary["high"] - summary["median"] for _, summary in found],
            ]
            axis.errorbar(
                middles,
                [place for place, _ in found],
                xerr=spread,
                fmt="o",
                markersize=6,
                color=colours[name],
                label=name,
            )
        axis.set_xscale("log")
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", color="#e2e8f0", which="major")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles, named = axes[0].get_legend_handles_labels()
    figure.legend(handles, named, loc="lower center", ncols=len(named), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(f"{stem}.png", dpi=120)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    pyplot.close(figure)
