"""A test that no stack runs is found out, from what pytest really writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from skipped_everywhere import never_run

MIXED = """
    import os
    import pytest

    STACK = os.environ["STACK"]
    only = lambda stack: pytest.mark.skipif(STACK != stack, reason=f"only on {stack}")

    @only("one")
    def test_of_one_stack(): pass

    @only("three")
    def test_of_no_stack(): pass

    @pytest.mark.parametrize("case", [1, pytest.param(2, marks=only("three"))])
    def test_with_cases(case): pass

    @pytest.mark.skipif(True, reason="needs a CUDA device")
    @only("two")
    def test_of_hardware(): pass

    @pytest.mark.xfail(reason="known")
    def test_known_to_fail(): assert False
"""
MODULE = """
    import os
    import pytest

    if os.environ["STACK"] != "{stack}":
        pytest.skip("only on {stack}", allow_module_level=True)

    def test_it(): pass
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What pytest wrote of the same tests on two stacks."""
    place = tmp_path_factory.mktemp("stacks")
    (place / "test_mixed.py").write_text(dedent(MIXED))
    for stack in ("two", "three"):
        (place / f"test_only_{stack}.py").write_text(dedent(MODULE.format(stack=stack)))
    files = []
    for stack in ("one", "two"):
        file = place / f"{stack}.xml"
        pytest_here = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(place)]
        subprocess.run(
            [*pytest_here, f"--junit-xml={file}", str(place)],
            env={**os.environ, "STACK": stack},
            capture_output=True,
            check=True,
        )
        files.append(file)
    return files


def test_what_is_skipped_on_every_stack_is_named_with_the_reason(outcomes: list[Path]) -> None:
    found = {line.partition(": ")[0]: line for line in never_run(outcomes)}
    assert found.keys() == {
        "test_mixed::test_of_no_stack",
        "test_mixed::test_with_cases[2]",
        "test_only_three",
    }
    assert "only on three" in found["test_mixed::test_of_no_stack"]


def test_the_command_fails_where_it_finds_any(outcomes: list[Path]) -> None:
    script = [sys.executable, str(Path(__file__).with_name("skipped_everywhere.py"))]
    done = subprocess.run([*script, *map(str, outcomes)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "3 tests are skipped on every stack\n"
    assert "test_of_no_stack" in done.stderr
