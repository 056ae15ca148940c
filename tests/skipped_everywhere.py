"""Names the tests that no stack ran: ``python tests/skipped_everywhere.py RESULTS.xml...``

Each file is what pytest wrote on one stack with ``--junit-xml``; a stack's tests may be spread over
several. A test may be skipped where it makes no sense; one that is skipped on every stack tests
nothing. Excepted are those that wait for hardware which is not there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

HARDWARE = re.compile(r"needs (an accelerator|a CUDA device|two CUDA devices|namespaces)")


def never_run(files: Sequence[Path]) -> Iterator[str]:
    """Yield each test that every file skips, with the reason of the first."""
    ran: set[str] = set()  # or wait for hardware
    skipped: dict[str, str] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            module, name = case.get("classname") or "", case.get("name") or ""
            skip = case.find("skipped")
            reason = "" if skip is None else f"{skip.get('message')} {skip.text}"
            if skip is None or skip.get("type") == "pytest.xfail" or HARDWARE.search(reason):
                # A module that is skipped as a whole stands there under its own name.
                ran |= {module, f"{module}::{name}"}
            else:
                skipped.setdefault(f"{module}::{name}" if module else name, reason)
    for name, reason in skipped.items():
        if name not in ran:
            yield f"{name}: {reason}"


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]]
    found = list(never_run(files))
    for line in found:
        print(line, file=sys.stderr)  # noqa: T201
    print(f"{len(found)} tests are skipped on every stack")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
