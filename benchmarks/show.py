"""Results as a line, a Markdown table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def line(row: dict[str, Any]) -> str:
    """Return one result in one line."""
    ours, peer = row["llmload"], row["peer"]
    return (
        f"{row['case']} {row['size']}: {ours['seconds']['median']:.2f} s against"
        f" {peer['seconds']['median']:.2f} s ({row['time_ratio']['median']:.2f}x), peak RSS"
        f" +{ours['peak_rss_mib']['median']:.0f} against +{peer['peak_rss_mib']['median']:.0f} MiB"
    )


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = [
        "# Loading, side by side",
        "",
        f"{results['date']}; {results['machine']}; {results['threads']} threads; {versions}.",
        "Medians over alternating pairs (lowest to highest in brackets), each run in its own"
        " process. MiB are above the process before the load, imports done; for whole processes"
        " they are totals. The ratio is ours over the peer's, pair by pair.",
        "",
        "| case | size | side | seconds | ratio | peak RSS MiB | peak RssAnon MiB | peak / final |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for row in results["rows"]:
        for side, name in (("llmload", "llmload"), ("peer", row["peer_name"])):
            figures = row[side]
            ratio = _range(row["time_ratio"], 2) if side == "llmload" else ""
            share = figures["peak_rss_mib"]["median"] / row["final_mib"]
            rows.append(
                f"| {row['title']} | {row['size']} | {name} | {_range(figures['seconds'], 2)}"
                f" | {ratio} | {_range(figures['peak_rss_mib'], 0)}"
                f" | {_range(figures['peak_anon_mib'], 0)} | {share:.3f} |"
            )
    targets = {row["title"]: row["target"] for row in results["rows"]}
    foot = ["", "Targets:", "", *(f"- {title}: {target}" for title, target in targets.items())]
    return "\n".join([*head, *rows, *foot]) + "\n"


def _range(summary: dict[str, float], digits: int) -> str:
    low, high = f"{summary['low']:.{digits}f}", f"{summary['high']:.{digits}f}"
    return f"{summary['median']:.{digits}f} ({low}-{high})"


def plot(results: dict[str, Any], stem: Path) -> None:
    """Draw time and memory of every row as bars, in ``stem.png`` and ``stem.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    labels = [f"{row['title']}\n{row['size']}" for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.2 + 0.62 * len(rows)), sharey=True)
    for axis, figure_name, title in (
        (axes[0], "seconds", "seconds"),
        (axes[1], "peak_rss_mib", "peak RSS, MiB"),
    ):
        for offset, side, colour in ((-0.2, "llmload", "#2b6cb0"), (0.2, "peer", "#a0aec0")):
            middles = [row[side][figure_name]["median"] for row in rows]
            low = [m - row[side][figure_name]["low"] for m, row in zip(middles, rows, strict=True)]
            high = [
                row[side][figure_name]["high"] - m for m, row in zip(middles, rows, strict=True)
            ]
            places = [i + offset for i in range(len(rows))]
            axis.barh(places, middles, 0.38, xerr=[low, high], color=colour, label=side)
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(f"{stem}.png", dpi=120)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    pyplot.close(figure)
