"""Writes the figures of SECURITY.md, from what a run of the tests of its promises left.

``python tests/hostile/figures.py OUTCOMES.xml...`` takes pytest's ``--junit-xml``. Of a test with
many cases it says how many passed; a test that counts by itself says what. Of a case that stands in
several files the last counts.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

SECURITY = Path(__file__).parent.parent.parent / "SECURITY.md"
BEGIN, END = "<!-- figures: nox -s long_trust -->\n", "<!-- end of figures -->\n"


def table(outcomes: list[str], promised: list[str]) -> str:
    """Return a row for each promised test that was run, in the order of the promises."""
    figures: dict[str, list[str]] = defaultdict(list)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    seconds: dict[str, float] = defaultdict(float)
    cases = {
        (case.attrib["classname"], case.attrib["name"]): case
        for file in outcomes
        for case in ElementTree.parse(file).iter("testcase")
    }
    for case in cases.values():
        name = case.attrib["name"].partition("[")[0]
        figures[name] += [
            p.attrib["value"] for p in case.iter("property") if p.attrib["name"] == "figure"
        ]
        failed = case.find("failure") is not None or case.find("error") is not None
        counts[name][1 if failed else 2 if case.find("skipped") is not None else 0] += 1
        seconds[name] += float(case.attrib["time"])
    lines = ["| test | last figure | seconds |", "|---|---|---|"]
    for name in dict.fromkeys(promised):
        if name in counts:
            passed, failed, skipped = counts[name]
            said = "; ".join(figures[name]) or f"{passed} of {passed + failed} cases passed"
            said += f", {failed} cases failed" if failed and figures[name] else ""
            said += f", {skipped} skipped" if skipped else ""
            lines.append(f"| `{name}` | {said} | {seconds[name]:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the figures in the place of the last ones."""
    text = SECURITY.read_text()
    promised = re.findall(r"`tests/[\w/]+\.py::(\w+)`", text)
    before, _, rest = text.partition(BEGIN)
    stack = f"Run with torch {version('torch')} and transformers {version('transformers')}.\n\n"
    made = stack + table(sys.argv[1:], promised)
    SECURITY.write_text(before + BEGIN + made + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
